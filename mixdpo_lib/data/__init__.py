"""Comparisons as data: no model, no gate, no expert."""
