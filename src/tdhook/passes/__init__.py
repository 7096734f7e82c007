"""The engine: how any method runs any model forwards and backwards."""
