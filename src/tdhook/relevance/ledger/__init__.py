"""Accounts of all relevance: where it went, and whether any was made or lost."""
