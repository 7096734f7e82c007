"""Rules for the torch functions that a forward pass calls."""
