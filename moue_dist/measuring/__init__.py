"""Numbers of a run: what a rank writes while it trains, and the run folder read again.

Imports configuration and, for the picture of time, `parallel/recording`."""
