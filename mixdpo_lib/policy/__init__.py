"""Gate, experts, beta and lapse rate as one policy: what it predicts, writes and leaves."""
