"""Bytes on one GPU, from the configuration alone: what `plan` predicts and a run's measured peak is held against."""
