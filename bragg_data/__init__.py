"""Crystallography, simulation and the versioned store of labelled Bragg profiles."""
