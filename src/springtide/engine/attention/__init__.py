"""Attention over pages of keys and values: one interface, one specification, one kernel per device."""
