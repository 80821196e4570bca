"""Time-of-flight diffractometers: calibration, resolution and peak shape."""
