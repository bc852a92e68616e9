"""The loop of an adaptive method: observe, score, decide, apply; and its state."""
