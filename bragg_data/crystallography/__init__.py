"""Unit cells, symmetry, structures from CIF files, and their reflections."""
