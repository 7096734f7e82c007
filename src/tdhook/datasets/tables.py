"""Tables: what a job has made, for polars, duckdb, pandas and whatever else reads Arrow or Parquet (pyarrow)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.result import Result
from tdhook.datasets.rows import Source, as_rows
from tdhook.datasets.stored import require_same_source
from tdhook.extras import require
from tdhook.files import replacing
from tdhook.keys import known_keys, parts_of

__all__ = ["arrow_batches", "arrow_of", "write_parquet"]

_BYTES = 32 << 20


def arrow_of(td: TensorDictBase, columns: dict[str, Tensor] | None = None) -> Any:
    """A TensorDict ``[rows, ...]`` as a ``pyarrow.RecordBatch``: what is one number per row as numbers, else as lists.

    A nested key is a name with dots; ``[rows, 1]`` counts as one number. bfloat16 becomes single precision.

    Args:
        td: the rows.
        columns: further columns, which come first, ``[rows]``.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: two entries have one name.
    """
    arrow = require("pyarrow", "writing tables")
    names, arrays = [], []
    entries = [(key, value) for key, value in td.items(True, True) if isinstance(value, Tensor)]
    for key, value in [*(columns or {}).items(), *sorted(entries, key=lambda entry: parts_of(entry[0]))]:
        names.append(".".join(parts_of(key)))
        arrays.append(_array(arrow, value))
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two entries are called {', '.join(sorted(twice))} as columns: rename one of them")
    return arrow.RecordBatch.from_arrays(arrays, names=names)


def _array(arrow: Any, value: Tensor) -> Any:
    dense = value.detach().cpu()
    dense = dense.float() if dense.dtype in (torch.bfloat16, torch.float16) else dense
    array = arrow.array(dense.contiguous().reshape(-1).numpy())
    features = dense.shape[1:].numel()
    if features == 1:
        return array
    for size in (*reversed(dense.shape[1:]),):
        array = arrow.FixedSizeListArray.from_arrays(array, size)
    return array


def arrow_batches(
    result: Result,
    source: Source | None = None,
    *,
    keys: Sequence[NestedKey] = (),
    checkpoint: int = 0,
) -> Iterator[Any]:
    """Kept rows as ``pyarrow.RecordBatch`` es, so many at a time that memory does not matter.

    The first column, ``row``, has their numbers.

    Args:
        result: of a job that keeps rows, all of which are done.
        source: the rows that were explained.
        keys: entries of the source that stand beside, as ``"action"``.
        checkpoint: of whose weights.

    Raises:
        ImportError: pyarrow is not installed.
        KeyError: the source has no such entry.
        RuntimeError: nothing was kept, or not all is done.
        ValueError: the source is another, or is needed and not given.
    """
    if keys and source is None:
        raise ValueError("keys= are entries of the source: give it, source=")
    rows = None if source is None else as_rows(source)
    if rows is not None:
        require_same_source(result.stored, rows)
    together = max(1, _BYTES // max(1, result.stored.layout.row_bytes))
    for begin in range(0, result.done.shape[-1], together):
        end = min(begin + together, result.done.shape[-1])
        found = TensorDict(dict(result.read(begin, end, checkpoint).items(True, True)), [end - begin])
        if rows is not None and keys:
            data = rows.read(begin, end)
            for key in keys:
                value = data.get(unravel_key(key), None)
                if not isinstance(value, Tensor):
                    raise KeyError(f"the source has no {key!r}: it has {known_keys(data)}")
                found.set(unravel_key(key), value)
        yield arrow_of(found, {"row": torch.arange(begin, end)})


def write_parquet(
    result: Result,
    path: str | os.PathLike[str],
    source: Source | None = None,
    *,
    keys: Sequence[NestedKey] = (),
    checkpoint: int = 0,
) -> Path:
    """Write kept rows as one file of Parquet, whole or not at all.

    Args:
        result: of a job that keeps rows, all of which are done.
        path: of the file.
        source: as :func:`arrow_batches` takes it.
        keys: as there.
        checkpoint: as there.

    Raises:
        ImportError: pyarrow is not installed.
        KeyError: the source has no such entry.
        RuntimeError: nothing was kept, or not all is done.
        ValueError: the source is another, or is needed and not given.
    """
    parquet = require("pyarrow.parquet", "writing tables")
    path = Path(path)
    batches = arrow_batches(result, source, keys=keys, checkpoint=checkpoint)
    first = next(batches)
    with replacing(path) as new, parquet.ParquetWriter(new, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return path
