"""What is inside a model: units of its layers, what they respond to, and what they carry."""

from tdhook.concepts.graphs import AttributionGraph, Node, attribution_graph
from tdhook.concepts.reference_samples import ReferenceSamples

__all__ = ["AttributionGraph", "Node", "ReferenceSamples", "attribution_graph"]
