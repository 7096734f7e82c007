"""A user's model, before any method: its keys, modules, state, and order of execution."""
