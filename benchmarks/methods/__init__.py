"""All methods on all agents and models by all measures: what wins, what loses, and what it costs."""
