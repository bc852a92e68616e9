"""Into a model, and out of it again: where adapters stand, what they are bound to, and how they are saved."""
