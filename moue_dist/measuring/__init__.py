"""Numbers of a run: what a rank writes while it trains, and the run folder read again.

Imports configuration and, of `parallel/`, the grid, the recorder and types of placement."""
