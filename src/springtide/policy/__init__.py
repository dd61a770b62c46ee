"""Every decision, as pure functions and small state machines: no I/O, no clock, no chance, no tensors."""
