"""Parts: calls that are several calls, made one by one, so that each is seen: of lists, and of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from tdhook.selectors.names import raw_name
from tdhook.tape.internals import dense_of, schema_of

__all__ = ["one_by_one"]

_PREFIX = "_foreach_"


def one_by_one(function: Callable[..., object]) -> Callable[..., object] | None:
    """What a function that acts on lists of tensors (``torch._foreach_mul``) or takes functions (``torch.cond``) does.

    ``None`` for all others.
    """
    name = raw_name(function)
    if name.startswith(_PREFIX):
        return _of_each(name.removeprefix(_PREFIX), list if schema_of(function) is not None else tuple)
    if name == "copy" and schema_of(function) is not None:
        return _copied
    dense = dense_of(function)
    return None if dense is None else {"cond": _cond, "scan": _scan, "while_loop": _while}.get(name, dense)


def _of_each(name: str, kind: Callable[[list[Tensor]], Sequence[Tensor]]) -> Callable[..., object] | None:
    single = torch.linalg.vector_norm if name == "norm" else getattr(torch.Tensor, name, None)
    if single is None:
        return None

    def each(first: object, *others: object, **named: object) -> object:
        if name in ("addcdiv", "addcdiv_", "addcmul", "addcmul_") and len(others) > 2:
            others, named = others[:2], {**named, "value": others[2]}
        length = next(len(given) for given in (first, *others) if isinstance(given, list | tuple))
        made = []
        for i in range(length):
            x, *rest = (_at(given, i) for given in (first, *others))
            further = {key: _at(given, i, scalar=key == "value") for key, given in named.items()}
            made.append(single(x, *rest, **further) if isinstance(x, Tensor) else torch.pow(x, *rest))
        return first if name.endswith("_") else kind(made)

    return each


def _at(given: object, index: int, *, scalar: bool = False) -> Any:
    """What an argument is for one tensor of the lists: an entry of a list, or the same for all."""
    if isinstance(given, list | tuple):
        return given[index]
    return given[index].item() if scalar and isinstance(given, Tensor) and given.dim() else given


def _copied(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The operator by which graphs assign, of which torch knows no derivative."""
    return source.to(destination).expand_as(destination).clone()


def _cond(
    condition: Tensor | bool,
    if_true: Callable[..., object],
    if_false: Callable[..., object],
    operands: Sequence[object] = (),
) -> object:
    return if_true(*operands) if condition else if_false(*operands)


def _while(
    condition: Callable[..., object],
    body: Callable[..., object],
    carried: Sequence[object],
    additional: Sequence[object] = (),
) -> object:
    """A loop: what is carried is given one by one, and returned as ``body`` returns it."""
    made, flat = None, list(carried)
    while condition(*flat, *additional):
        made = body(*flat, *additional)
        flat = tree_leaves(made)
    if made is None:
        with torch.no_grad():  # it tells the structure alone
            made = body(*flat, *additional)
    return tree_unflatten(flat, tree_structure(made))


def _scan(
    combine: Callable[..., object], init: Sequence[object], xs: Sequence[Tensor], additional: Sequence[object]
) -> object:
    """A scan over the first axis.

    ``combine(*carry, *x, *additional)`` returns ``(*carry, *out)`` where a graph calls it, ``(carry, out)`` where a
    model does; so does the scan.
    """
    flat, outs, made = list(init), [], None
    for i in range(len(xs[0]) if xs else 0):
        made = combine(*flat, *(x.select(0, i) for x in xs), *additional)
        leaves = tree_leaves(made)
        flat, out = leaves[: len(init)], leaves[len(init) :]
        outs.append(out)
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*outs, strict=True)]
    if made is None:
        return (*flat, *stacked)
    return tree_unflatten([*flat, *stacked], tree_structure(made))
