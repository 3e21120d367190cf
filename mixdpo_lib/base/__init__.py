"""The frozen base: its weights, its head, and one pass over texts that is kept."""
