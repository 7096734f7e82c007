"""Writes to places: of several values that are written to one, the last is there.

torch's derivative gives what arrives at such a place to each of them. Here it goes to the one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from tdhook.tape.functions import on_tape
from tdhook.tape.internals import transformed

__all__ = ["PLACING", "leaves_some", "may_meet"]

_NAMES: Mapping[str, tuple[str, ...]] = {
    "index_copy": ("input", "dim", "index", "source"),
    "index_put": ("input", "indices", "values"),
    "put": ("input", "index", "source"),
    "scatter": ("input", "dim", "index", "src"),
    "setitem": ("input", "indices", "values"),
}


def may_meet(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether a call writes values that depend on the inputs, several of them to one place.

    A graph is made for any values, of which it cannot be said.
    """
    input, *at, source = _bound(name, args, kwargs)
    if not (isinstance(source, Tensor) and on_tape(source)) or not _repeat(at) or transformed():
        return False
    count = _ids(name, input, at, source).numel()
    if count < 2 or torch.compiler.is_compiling():
        return count > 1
    return bool((_last(name, input, at, source) >= 0).sum() < count)


def leaves_some(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether there are places for some of the values alone, where torch's derivative fails."""
    if name not in ("scatter", "scatter_add", "scatter_reduce"):
        return False
    _, _, index, source = _bound("scatter", args, kwargs)
    return isinstance(source, Tensor) and on_tape(source) and source.shape != index.shape


def _bound(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Any]:
    given: list[Any] = list(args[: len(_NAMES[name])])
    given += [kwargs.get(key) for key in _NAMES[name][len(given) :]]
    if name == "index_put":  # ``None`` stands for all of an axis there
        given[1] = tuple(slice(None) if x is None else x for x in given[1])
    return given


def _repeat(at: object) -> bool:
    """Whether places are named by lists or tensors of integers, which may name one twice."""
    if isinstance(at, Tensor):
        return at.dtype != torch.bool and at.numel() > 1
    if isinstance(at, list | tuple):
        return any(_repeat(x) or isinstance(x, list) for x in at)
    return not isinstance(at, int | slice | EllipsisType | None)


def _ids(name: str, input: Tensor, at: Sequence[Any], source: Tensor) -> Tensor:
    """A number for each value that is written."""
    shape = source.shape
    if name == "scatter":
        shape = at[1].shape
    elif name in ("index_put", "setitem"):
        shape = torch.empty(input.shape, dtype=torch.bool, device=input.device)[at[0]].shape
    return torch.arange(shape.numel(), device=input.device).view(shape)


def _last(name: str, input: Tensor, at: Sequence[Any], source: Tensor) -> Tensor:
    """The number of the value that is at each place, or -1 where none was written."""
    last = torch.full(input.shape, -1, device=input.device)
    ids = _ids(name, input, at, source)
    if name in ("index_put", "setitem"):
        last[at[0]] = ids
    else:
        getattr(last, f"{name}_")(*at, ids)
    return last


def _placed(name: str) -> Callable[..., Tensor]:
    def write(*args: object, **kwargs: object) -> Tensor:
        input, *at, source = _bound(name, args, kwargs)
        with torch.no_grad():
            last, shape = _last(name, input, at, source), _ids(name, input, at, source).shape
        if name == "scatter":
            source = source[tuple(map(slice, shape))]
        elif name in ("index_put", "setitem"):
            source = source.reshape(source.shape[max(source.dim() - len(shape), 0) :]).expand(shape)
        written = source.reshape(-1)[last.clamp(min=0)].to(input.dtype)
        return torch.where(last >= 0, written, input)

    return write


def _reduced(
    input: Tensor, dim: int, index: Tensor, src: Any = None, *, value: Any = None, reduce: str
) -> Tensor:
    """``scatter`` with a reduction, which torch has no derivative of, as the operation that it has one of."""
    given = src if src is not None else value
    if not isinstance(given, Tensor):
        given = torch.full(index.shape, given, dtype=input.dtype, device=input.device)
    return _of_some(torch.scatter_reduce)(
        input, dim, index, given, {"add": "sum", "multiply": "prod"}[reduce]
    )


def _scatter(*args: Any, reduce: str | None = None, **kwargs: Any) -> Tensor:
    return _PLACED["scatter"](*args, **kwargs) if reduce is None else _reduced(*args, reduce=reduce, **kwargs)


def _of_some(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def write(
        input: Tensor, dim: int, index: Tensor, src: Tensor, *others: object, **named: object
    ) -> Tensor:
        return function(input, dim, index, src[tuple(map(slice, index.shape))], *others, **named)

    return write


_PLACED: Mapping[str, Callable[..., Tensor]] = {name: _placed(name) for name in _NAMES}
PLACING: Mapping[str, Callable[..., Tensor]] = {
    **_PLACED,
    "scatter": _scatter,
    "scatter_add": _of_some(torch.scatter_add),
    "scatter_reduce": _of_some(torch.scatter_reduce),
}
"""What writes to places, by name, in operations whose derivatives go to what is there."""
