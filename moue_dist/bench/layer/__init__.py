"""Times one MoE layer, or its data movement alone, on the ranks of one pipeline stage."""
