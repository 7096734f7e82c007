"""Again: rows that a job has kept, reduced to something else after the fact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.reducers import as_names
from tdhook.datasets.reducing import Part, Piece, Reducer, add_part
from tdhook.datasets.result import Result
from tdhook.datasets.rows import Source, as_rows
from tdhook.datasets.stored import require_same_source
from tdhook.keys import parts_of

__all__ = ["reduce_kept"]

_BYTES = 16 << 20


def reduce_kept(
    result: Result, reducers: Sequence[Reducer], source: Source | None = None, checkpoint: int = 0
) -> dict[str, TensorDict]:
    """Reduce the rows that a job has kept, as they were kept.

    Args:
        result: of a job that keeps rows, all of which are done.
        reducers: what is made of them.
        source: the rows that were explained, which reducers need that tell rows apart.
        checkpoint: with whose weights.

    Returns:
        What they were reduced to, by the name of the reducer.

    Raises:
        RuntimeError: nothing was kept, or not all is done.
        ValueError: the source is another, or is needed and not given.
    """
    named = as_names(reducers)
    apart = [one.name for one in reducers if one.by is not None]
    if apart and source is None:
        raise ValueError(f"{', '.join(apart)}: rows are told apart by what the source has: give it, source=")
    count = result.done.shape[-1]
    rows = None if source is None else as_rows(source)
    if rows is not None:
        require_same_source(result.stored, rows)
    each = max(1, result.stored.layout.row_bytes)
    together = max(1, _BYTES // each)
    parts: dict[str, Part] = {}
    for begin in range(0, count, together):
        end = min(begin + together, count)
        found: dict[NestedKey, Tensor] = dict(result.read(begin, end, checkpoint).items(True, True))
        data = TensorDict({}, [end - begin]) if rows is None else rows.read(begin, end)
        piece = Piece(data, torch.arange(begin, end), _relevance(found, result.attribution_key), found)
        for one in reducers:
            add_part(parts, one, piece)
    return {name: TensorDict(named[name].result(part), []) for name, part in parts.items()}


def _relevance(found: dict[NestedKey, Tensor], attribution_key: NestedKey) -> dict[NestedKey, Tensor]:
    above = parts_of(attribution_key)
    return {
        unravel_key(parts_of(key)[len(above) :]): value
        for key, value in found.items()
        if parts_of(key)[: len(above)] == above and len(parts_of(key)) > len(above)
    }
