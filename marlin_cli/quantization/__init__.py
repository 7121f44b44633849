"""From (weight, statistics, settings) to packed weights, in MLX's formats."""
