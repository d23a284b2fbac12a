"""Decides before anything starts: what cannot run, what is not proven, and what `auto` becomes on a machine.

Free of torch. Imports configuration, measured use and the arithmetic of mesh and placement."""
