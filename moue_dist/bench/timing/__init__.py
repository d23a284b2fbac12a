"""How time is taken: steps of all ranks, and two ways of one thing in turns."""
