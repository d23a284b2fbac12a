"""A look at what an exported folder has learned: text, losses, choices. transformers runs in a process of its own."""
