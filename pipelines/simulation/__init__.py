"""Simulators on workers, and draws of measured-looking profiles."""
