"""Pages, figures and pictures of runs and of the pool. Imports measuring, configuration and parallel's arithmetic."""
