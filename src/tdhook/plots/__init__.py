"""Pictures of relevance (extra ``viz``: matplotlib, imported at the first use).

Figures are made without pyplot: nothing global changes, no window opens, and ``figure.savefig(path)`` works anywhere.
Red is relevance that speaks for the target, blue relevance that speaks against it, white is none.
"""

from tdhook.plots.frames import overlay, relevance_on_frames
from tdhook.plots.graphs import relevance_graph
from tdhook.plots.matrices import relevance_matrix
from tdhook.plots.references import reference_sheet
from tdhook.plots.style import RELEVANCE_COLOURS
from tdhook.plots.time import relevance_over_time
from tdhook.plots.tokens import relevance_of_tokens
from tdhook.plots.training import relevance_during_training
from tdhook.plots.vectors import relevance_bars, relevance_profile

__all__ = [
    "RELEVANCE_COLOURS",
    "overlay",
    "reference_sheet",
    "relevance_bars",
    "relevance_during_training",
    "relevance_graph",
    "relevance_matrix",
    "relevance_of_tokens",
    "relevance_on_frames",
    "relevance_over_time",
    "relevance_profile",
]
