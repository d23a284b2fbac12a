"""A run's state on disk, whatever the layout that saves or loads it. Imports the model's `System`."""
