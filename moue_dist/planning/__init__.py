"""The dry run: parameters, FLOPs, bytes, where the pool lives, whether it fits, and what would.

Free of torch. Imports configuration, measured use, refusals and the arithmetic of mesh and placement."""
