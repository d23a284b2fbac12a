"""Times the training step of all ranks of a job, part by part."""
