"""Gate, experts and beta as one policy: what it predicts, writes and leaves."""
