"""Times the training step, alone or beside megatron-core's own; the command line alone stands above."""
