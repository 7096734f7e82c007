"""Concepts: relevance through the inside of a model, and what it is of."""

from tdhook.concepts.bases import Basis, NonNegativeBasis, non_negative_factors, principal_components
from tdhook.concepts.dictionaries import Dictionary, Spliced, SplicedModel

__all__ = [
    "Basis",
    "Dictionary",
    "NonNegativeBasis",
    "Spliced",
    "SplicedModel",
    "non_negative_factors",
    "principal_components",
]
