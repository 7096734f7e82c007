"""Cutting: what outlives an explanation, a state that a model keeps say, is taken off its graph.

A graph lives as long as somebody holds a value on it. That its leaves are gone tells that nobody does. Where they are
not, the values are looked for among all that Python knows of, the youngest first, wherever they are kept: on modules,
in containers, closures or objects of libraries.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import partial
from types import FrameType, FunctionType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils import swap_tensors

from tdhook.tape.internals import base_of, is_view, without_modes

__all__ = ["Graph"]

_MOST = 20_000  # of objects


class Graph:
    """The graph of one explanation, as far as its leaves tell."""

    def __init__(self) -> None:
        self._leaves: list[ref[Tensor]] = []

    def grows_from(self, begun: Iterable[Tensor]) -> None:
        """Note where it begins: what :func:`~tdhook.tape.dependence.leaf` made, each a view of a leaf."""
        self._leaves += [ref(base_of(x)) for x in begun]

    @property
    def alive(self) -> bool:
        """Whether anybody holds a value on it."""
        for leaf in self._leaves:  # noqa: SIM110 (likewise asked in each call)
            if leaf() is not None:
                return True
        return False

    def cut_off(self, root: object, *, everywhere: bool) -> bool:
        """Take off it whatever is still held.

        Args:
            root: what is known to hold things, a model: all that it leads to is looked at.
            everywhere: whether to look at whatever else there is, if need be, and not only at what is young.

        Returns:
            Whether it is of use to look everywhere.
        """
        for look in (_young, _less_young, partial(_below, root)):
            if self.alive:
                self._cut_off_among(look())
        if everywhere and self.alive:
            everywhere = self._cut_off_among(gc.get_objects()) > 0
        for leaf in self._leaves:
            held = leaf()
            if held is not None:
                held.requires_grad_(False)
        return everywhere

    def _cut_off_among(self, objects: Iterable[object]) -> int:
        """Take those objects off it that are on it, and say how many."""
        held = (leaf() for leaf in self._leaves)
        leaves = {id(leaf) for leaf in held if leaf is not None}
        reached: dict[Any, bool] = {}
        count = 0
        for value in objects:
            # Not isinstance: some objects pass for what they stand for, which may be gone.
            if not issubclass(type(value), Tensor):
                continue
            try:
                node = value.grad_fn  # type: ignore[attr-defined]
            except RuntimeError:  # a view of what was overwritten, of which torch tells nothing any more
                continue
            if node is not None and _reaches(node, leaves, reached):
                _detach(value)  # type: ignore[arg-type]
                count += 1
        return count


def _young() -> Iterable[object]:
    return gc.get_objects(0)


def _less_young() -> Iterable[object]:
    return gc.get_objects(1)


def _below(root: object) -> Iterable[object]:
    """What an object leads to, but for what all share: classes, functions of modules, and modules of Python."""
    seen: dict[int, object] = {}
    ahead = [root]
    while ahead and len(seen) < _MOST:
        value = ahead.pop()
        if id(value) in seen or isinstance(value, type | ModuleType | FrameType):
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            ahead += value.__closure__ or ()
        elif not issubclass(type(value), Tensor):
            ahead += gc.get_referents(value)
    return seen.values()


def _reaches(node: Any, leaves: set[int], reached: dict[Any, bool]) -> bool:
    """Whether a node of the tape was made of one of the leaves."""
    path = [(node, iter(node.next_functions))]
    if node in reached:
        return reached[node]
    reached[node] = id(getattr(node, "variable", None)) in leaves
    while path:
        current, parents = path[-1]
        for parent, _ in parents:
            if parent is None:
                continue
            if parent not in reached:
                reached[parent] = id(getattr(parent, "variable", None)) in leaves
                path.append((parent, iter(parent.next_functions)))
                break
            reached[current] = reached[current] or reached[parent]
        else:
            path.pop()
            if path:
                reached[path[-1][0]] = reached[path[-1][0]] or reached[current]
    return reached[node]


def _detach(value: Tensor) -> None:
    with without_modes():  # one that watches the pass is on still, where that was interrupted
        if not is_view(value):
            value.detach_()
            return
        try:
            swap_tensors(value, value.detach())
        except RuntimeError:  # it is weakly referred to
            return
