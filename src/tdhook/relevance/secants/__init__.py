"""Secants: what of a function's difference between two inputs is due to which part of the difference of the inputs."""
