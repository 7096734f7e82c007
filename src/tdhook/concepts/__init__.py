"""What is inside a model: units of its layers, what they respond to, and what they carry."""

from tdhook.concepts.graphs import AttributionGraph, Node, attribution_graph

__all__ = ["AttributionGraph", "Node", "attribution_graph"]
