"""Measured profiles: readers, calibration, resampling on a campaign's grid."""
