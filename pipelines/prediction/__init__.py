"""Predictions about measured profiles, on the command line and over HTTP."""
