"""Selectors: values that say which modules and operations of a model are meant.

A selector is plain data. It is built up with ``&``, ``|`` and ``~``, printed, compared and written to a dictionary;
only a model's :class:`Site` tells whether it matches.

    Type(nn.Linear) & ~Name("head.*")
"""

from tdhook.models.sites import Site
from tdhook.selectors.base import Selector, SelectorLike, as_selector
from tdhook.selectors.operations import Op
from tdhook.selectors.places import First, Last, Name, Reads, Type, Where, Writes

__all__ = [
    "First",
    "Last",
    "Name",
    "Op",
    "Reads",
    "Selector",
    "SelectorLike",
    "Site",
    "Type",
    "Where",
    "Writes",
    "as_selector",
]
