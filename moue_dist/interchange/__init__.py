"""Models of other projects: in (`incoming/`) and out (`outgoing/`), and the names that both share."""
