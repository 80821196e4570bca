"""Simulators of powder patterns, and the effects that a measurement adds."""
