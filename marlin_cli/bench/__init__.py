"""Measurements of models: how fast they run, what they weigh, and how well they predict held-out bytes."""
