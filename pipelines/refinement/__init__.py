"""Refinement of known structures on measured banks: inputs, results as JSON and on the terminal."""
