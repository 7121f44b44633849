"""How well models predict: held-out bytes, pairs, scores with their errors, what packing costs. Nothing is timed or printed."""
