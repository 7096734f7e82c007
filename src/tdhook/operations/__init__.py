"""The operations between the modules: what each is called, what rule it has, and how it is run under it."""
