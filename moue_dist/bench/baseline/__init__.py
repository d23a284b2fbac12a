"""megatron-core as it comes: what ours is measured against."""
