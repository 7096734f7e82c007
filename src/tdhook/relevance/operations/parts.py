"""Parts: calls that are several calls, made one by one, so that each is seen: of lists, and of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdhook.selectors.names import raw_name
from tdhook.tape.internals import dense_of, schema_of

__all__ = ["one_by_one"]

_PREFIX = "_foreach_"


def one_by_one(function: Callable[..., object]) -> Callable[..., Any] | None:
    """What a function that acts on lists of tensors (``torch._foreach_mul``) or takes functions (``torch.cond``) does.

    ``None`` for all others.
    """
    name = raw_name(function)
    if name.startswith(_PREFIX):
        return _of_each(name.removeprefix(_PREFIX), list if schema_of(function) is not None else tuple)
    return _scan if name == "scan" and dense_of(function) is not None else dense_of(function)


def _of_each(name: str, kind: Callable[[list[Tensor]], Sequence[Tensor]]) -> Callable[..., Any] | None:
    single = torch.linalg.vector_norm if name == "norm" else getattr(torch.Tensor, name, None)
    if single is None:
        return None

    def each(first: Any, *others: Any, **named: Any) -> Sequence[Tensor]:
        if name in ("addcdiv", "addcdiv_", "addcmul", "addcmul_") and len(others) > 2:
            others, named = others[:2], {**named, "value": others[2]}
        length = len(first if isinstance(first, list | tuple) else others[0])
        made = []
        for i in range(length):
            x, *rest = (_at(given, i) for given in (first, *others))
            further = {key: _at(given, i, scalar=key == "value") for key, given in named.items()}
            made.append(single(x, *rest, **further) if isinstance(x, Tensor) else torch.pow(x, *rest))
        return first if name.endswith("_") else kind(made)

    return each


def _at(given: Any, index: int, *, scalar: bool = False) -> Any:
    """What an argument is for one tensor of the lists: an entry of a list, or the same for all."""
    if isinstance(given, list | tuple):
        return given[index]
    return given[index].item() if scalar and isinstance(given, Tensor) and given.dim() else given


def _scan(combine: Callable[..., Any], init: Sequence[Any], xs: Sequence[Tensor], additional: Sequence[Any]) -> Any:
    """``torch``'s scan over the first axis: ``combine(*carry, *x, *additional)`` returns ``(*carry, *out)``."""
    carry, outs = list(init), []
    for i in range(len(xs[0]) if xs else 0):
        made = tree_leaves(combine(*carry, *(x.select(0, i) for x in xs), *additional))
        carry, out = made[: len(init)], made[len(init) :]
        outs.append(out)
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*outs, strict=True)]
    return (*carry, *stacked)
