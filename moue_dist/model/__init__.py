"""The model: one pool of experts, the layers that route into it, and the losses that balance it."""
