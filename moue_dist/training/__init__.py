"""The training step and the loop around it. Imports neither reports nor benchmarks."""
