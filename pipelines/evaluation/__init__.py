"""Scores of models on simulated and measured profiles."""
