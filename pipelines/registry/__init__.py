"""Registered models and feature views."""
