"""The files that go into an exported folder, for transformers. Nothing of the project imports them."""
