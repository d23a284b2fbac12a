"""Text as tokens: written once in megatron-core's indexed format, and read in an order that no layout changes."""
