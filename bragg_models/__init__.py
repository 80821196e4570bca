"""Models that answer for a structure from a profile: numpy and torch, no tracking, no cluster."""
