"""Times one rank of a larger layout, alone on one device."""
