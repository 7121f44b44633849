"""What a byte costs by a model's shape and this machine's operations: sizes, arithmetic, bandwidths, predicted times."""
