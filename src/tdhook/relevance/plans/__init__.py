"""Which module and operation of a model runs under which rule."""
