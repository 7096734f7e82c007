"""How one call runs under one rule."""
