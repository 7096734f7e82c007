"""Backward passes past values that are not finite.

A value that is NaN or infinite, though what is explained is finite, has no part in it: it was masked out. The rules of
calculus say ``0 * nan`` all the same. So a backward pass that brings something else than numbers is run once more, on a
tape that keeps numbers alone.
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from tdhook.tape.conditions import holds
from tdhook.tape.functions import may_look_at, nodes_behind
from tdhook.tape.internals import begins_tape_inside, is_plain, maker_of, saved_by

__all__ = ["Disregarding", "are_finite"]

# Element by element: where nothing comes in, nothing goes out.
_ELEMENTWISE = re.compile(
    "(Div|Mul|Pow|Sqrt|Rsqrt|Reciprocal|Exp|Log|Add|Sub|Where|MaskedFill|Clamp|Ratio|PerValue)"
)
# Which of several values is taken is told by these, NaN and infinities included.
_CHOICES = re.compile("(Nan|Fm|Max|Min|Amax|Amin|Cummax|Cummin|Median|Mode|Kthvalue|Sort|Topk|Clamp)")


def are_finite(found: Sequence[Tensor | None]) -> bool:
    """Whether what a backward pass brought has neither NaN nor infinities: one sum for each tensor, and one look."""
    for x in found:
        if x is None:
            continue
        if not may_look_at(x):
            finite = holds(x.isfinite())
        else:
            finite = cmath.isfinite(x.sum().item()) or bool(x.isfinite().all())
        if not finite:
            return False
    return True


class Disregarding:
    """Makes a tape disregard the values on it that are not finite, and sees where others arise all the same.

    Args:
        tensors: where the backward pass starts.
        looks: whether to look where others arise.

    Attributes:
        culprit: the node at which finite gradients became others, once there was a backward pass; ``None`` if none did.
    """

    def __init__(self, tensors: Sequence[Tensor], *, looks: bool = True) -> None:
        self.culprit: Any = None
        # Hooks know their node by its place here: a node that a hook of its own holds would never be gone.
        self._nodes = list(_nodes(tensors)) if looks else []
        for place, node in enumerate(self._nodes or _nodes(tensors)):
            # The identities of the library know that what is infinite has no relevance.
            maker = maker_of(node)
            foreign = maker is not None and maker.__module__.partition(".")[0] != __name__.partition(".")[0]
            keeps = _known if maker is not None and not hasattr(node, "executed") else _numbers
            for kept in () if _CHOICES.match(node.name()) else saved_by(node):
                if foreign and begins_tape_inside(kept):
                    continue
                try:
                    kept.register_hooks(keeps, _itself)
                except RuntimeError:  # nothing is kept, or what is kept is made once more
                    continue
            elementwise = _ELEMENTWISE.match(node.name()) is not None
            if looks or elementwise:
                node.register_hook(_watching(ref(self) if looks else None, place, elementwise))

    def see(self, place: int, found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        """Look at what the backward pass made at a node of what was given to it."""
        searches = self.culprit is None and _are_seen([*found, *given])
        if searches and are_finite(given) and not are_finite(found):
            self.culprit = self._nodes[place]


def _watching(
    watcher: ref[Disregarding] | None, place: int, elementwise: bool
) -> Callable[..., tuple[Tensor | None, ...]]:
    def watch(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        if elementwise:
            found = [_where_given(x, given) for x in found]
        looking = None if watcher is None else watcher()
        if looking is not None:
            looking.see(place, found, given)
        return tuple(found)

    return watch


def _are_seen(tensors: Sequence[Tensor | None]) -> bool:
    return not torch.compiler.is_compiling() and all(x is None or may_look_at(x) for x in tensors)


def _where_given(found: Tensor | None, given: Sequence[Tensor | None]) -> Tensor | None:
    """Nothing where nothing came in."""
    if found is None:
        return None
    like = next((x for x in given if x is not None and x.shape == found.shape), None)
    return found if like is None else torch.where((like == 0) & ~found.isfinite(), 0.0, found)


def _numbers(x: Tensor) -> Tensor:
    """What is kept of a tensor: zeros for NaN, and for infinities the largest number."""
    if not _is_here(x):
        return x
    return x if bool(x.isfinite().all()) else x.nan_to_num(0.0)


def _known(x: Tensor) -> Tensor:
    """Likewise, with infinities as they are."""
    if not _is_here(x):
        return x
    return x.nan_to_num(0.0, torch.inf, -torch.inf)


def _is_here(x: Tensor) -> bool:
    """Whether a tensor is of numbers that lie in memory, all of them.

    That of sharded parameters is given back until it is needed; sparse tensors hold some of their elements alone.
    """
    if not x.is_floating_point() or not is_plain(x):
        return False
    return type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.untyped_storage().size() > 0


def _itself(x: Tensor) -> Tensor:
    return x


def _nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the tape behind some tensors, with those that rules keep apart."""
    return nodes_behind((x.grad_fn for x in tensors), _kept_apart)


def _kept_apart(node: Any) -> Iterable[Node]:
    own = getattr(getattr(node, "executed", None), "tape", None)
    return () if own is None else own.nodes
