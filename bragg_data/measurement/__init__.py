"""Measured profiles: files, calibration, and the way to a campaign's grid."""
