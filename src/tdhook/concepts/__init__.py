"""What is inside a model: units of its layers, what they respond to, and what they carry."""

from tdhook.concepts.bases import Basis, NonNegativeBasis, non_negative_factors, principal_components
from tdhook.concepts.dictionaries import Dictionary, Spliced, SplicedModel
from tdhook.concepts.found import Found
from tdhook.concepts.graphs import AttributionGraph, Node, attribution_graph
from tdhook.concepts.reference_samples import ReferenceSamples

__all__ = [
    "AttributionGraph",
    "Basis",
    "Dictionary",
    "Found",
    "Node",
    "NonNegativeBasis",
    "ReferenceSamples",
    "Spliced",
    "SplicedModel",
    "attribution_graph",
    "non_negative_factors",
    "principal_components",
]
