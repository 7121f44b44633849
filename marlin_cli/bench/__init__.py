"""Runs of `marlin bench`: models are timed and scored, and what was measured becomes a result."""
