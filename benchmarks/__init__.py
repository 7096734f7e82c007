"""What an explanation costs, against the gradient of the same model; run with ``python -m benchmarks``."""
