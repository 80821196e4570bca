"""Refinement of cells against a measured profile."""
