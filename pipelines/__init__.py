"""The command lines, which alone wire data, models, catalog and compute together."""
