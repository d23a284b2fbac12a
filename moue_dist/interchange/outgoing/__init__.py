"""Models out: a checkpoint of ours as a Hugging Face folder, and a look at what such a folder has learned."""
