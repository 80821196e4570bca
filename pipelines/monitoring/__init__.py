"""Drift of served profiles: what the record of answers shows, and what to do about it."""
