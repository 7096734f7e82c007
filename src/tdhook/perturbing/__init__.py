"""What is replaced by what: features of an input, and baselines."""
