"""moue-dist: a distributed trainer for Mixture of Universal Experts on megatron-core primitives."""

__version__ = "0.1.0"
