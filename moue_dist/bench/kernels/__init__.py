"""Times the kernels of one rank at the sizes of a configuration, each beside another way of the same."""
