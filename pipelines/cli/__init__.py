"""Shared by the commands: console, options, colours and units."""
