"""Caches, sampling, decoding loops and scoring. Knows networks and arrays, nothing of files or terminals."""
