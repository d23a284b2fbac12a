"""What a benchmark leaves: the JSON record and the tables."""
