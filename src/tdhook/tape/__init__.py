"""The tape of autograd: what is put on it, where a value came from, what overwrites it."""
