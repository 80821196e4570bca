"""The fit loop, its checkpoints, and inference in batches."""
