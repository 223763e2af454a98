"""What every trainer stands on: the window that is a step, settings, checkpoints, metrics, memory switches. No
algorithm."""
