"""Model files as named tensors, whatever their format. Knows nothing of what the tensors are for."""
