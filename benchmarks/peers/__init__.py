"""Other libraries for the same job, each used as its documentation says.

Where there is a choice, it is to their advantage: their models are frozen, and a context that a library wants is
entered once, before what is timed. They start from and return tensors.

A module here has ``contender(case, device)``; what it needs of its library is imported there, so that the rest runs
where the library is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from benchmarks.cases import Case
from benchmarks.library_models import Unavailable
from benchmarks.timing import Contender

__all__ = ["PEERS", "peers", "rules_for"]

PEERS = {
    "zennit": "zennit",
    "tdhook 0.3": "tdhook_03",
    "autoLRP": "autolrp",
    "captum": "captum",
    "LXT": "lxt",
}


def peers(case: Case, device: str) -> dict[str, Callable[[], Contender]]:
    """What makes the contender of each peer; it raises where the peer cannot run the case."""
    return {name: partial(_contender, file, case, device) for name, file in PEERS.items()}


def _contender(file: str, case: Case, device: str) -> Contender:
    if case.index == "all":
        raise Unavailable("explains one output at a time")
    try:
        made: Contender = import_module(f"benchmarks.peers.{file}").contender(case, device)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    return made


def rules_for(case: Case, known: dict[str, object]) -> object:
    """What a peer has for the preset of a case.

    Raises:
        Unavailable: it has nothing.
    """
    if case.preset not in known:
        raise Unavailable(f"has nothing like the preset {case.preset}")
    return known[case.preset]
