"""The training of each model: its stages, in their order."""
