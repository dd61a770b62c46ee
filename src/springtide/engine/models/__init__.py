"""Model families, written over `Linear` and the attention backend. Knows nothing of batches or sampling."""
