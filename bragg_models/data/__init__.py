"""Profiles of a snapshot as training batches."""
