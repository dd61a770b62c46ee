"""The shared nouns. Knows nothing of sockets, tensors or policies, and imports nothing of ours."""
