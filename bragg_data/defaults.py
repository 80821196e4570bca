"""Defaults that command lines show, importable without the libraries that use them."""

DEFAULT_URI = "data/store"  # of the commands, relative to the working directory
DEFAULT_CAMPAIGN = "batio3-nomad"  # the paper's: barium titanate on bank 4 of NOMAD
PATTERN_SECONDS = 600.0  # time limit of one pattern of GSAS-II
