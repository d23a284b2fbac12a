"""Models in: a Hugging Face folder becomes a checkpoint of ours and a configuration."""
