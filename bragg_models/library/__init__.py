"""Library match: the stored patterns most similar to a profile."""
