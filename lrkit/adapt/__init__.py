"""Adapters in a model: how they get in and out, how optimizers run them, and how they are saved."""
