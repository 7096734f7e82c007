"""What depends on the leaves of a pass: that alone is explained, and all else is a constant, however it is reached.

That a tensor requires a gradient does not say so. Weights do, whether a module holds them, a closure or a list; so does
what was computed of them before the pass and kept, and the state that a model keeps from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tdhook.tape.internals import (
    inside,
    is_batched,
    is_wrapped,
    nodes_made,
    number_of,
    transformed,
)
from tdhook.tape.sparse import SPARSE, Live
from tdhook.tape.trees import tree_leaves, tree_map_tensors

__all__ = ["Dependence", "leaf"]

T = TypeVar("T")
_LEAF, _OWN = "_leaf_of_a_pass", "_own_of_a_model"
_IN_A_THREAD = (
    "the model computes with its inputs in another thread, where no rule sees what it does: have it run in one thread, "
    "or explain it by a method that needs its gradients or outputs alone"
)


def leaf(x: Tensor) -> Tensor:
    """A tensor of the same values, at which the tape of a pass begins: a view, known by the node that made it."""
    found = x.detach()
    setattr(found, _LEAF, True)
    if torch.is_grad_enabled():
        return found.requires_grad_().view_as(found)
    with torch.enable_grad():
        return found.requires_grad_().view_as(found)


def _is_leaf(x: Tensor) -> bool:
    """Whether the tape of a pass begins at a tensor."""
    return getattr(x, _LEAF, False) is True


class Dependence:
    """Tells what depends on the leaves of one pass, by when it came onto the tape.

    Nothing that was on the tape before the pass began depends on its leaves. What comes onto it in the pass does,
    provided that constants are taken off it before anything is computed of them (:meth:`sorted`). A model that puts
    tensors on the tape by itself, in order to differentiate in its forward pass say, is looked at more closely: back
    from each value to where the tape begins.

    Args:
        first: the number of the first node on the tape that may depend on leaves.
    """

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._reached: dict[Node, bool] | None = None

    @staticmethod
    def looking_back() -> Dependence:
        """What looks back from each value to where the tape begins, whatever else is on it."""
        made = Dependence()
        made._reached = {}
        return made

    def __getstate__(self) -> dict[str, object]:
        return {"_first": 0, "_reached": None}

    def begin(self) -> None:
        """Begin a pass."""
        self._first, self._reached = nodes_made(), None

    def end(self) -> None:
        """End the pass: nothing of its tape is held on to."""
        self._reached = None

    def begin_again(self) -> Dependence:
        """What tells the same in a part of the pass that is run once more, maybe by another thread."""
        return Dependence(min(self._first, nodes_made()))

    def look_closely(self, x: Tensor) -> None:
        """From now on look back from each value, as the model itself puts ``x`` on the tape."""
        if not _is_leaf(x):
            setattr(x, _OWN, True)
            self._reached = {} if self._reached is None else self._reached

    def has(self, x: Tensor) -> bool:
        """Whether a tensor depends on the leaves of the pass."""
        while not x.requires_grad:
            if not transformed() or not is_batched(x):
                return False
            x = inside(x)
        node = x.grad_fn
        if node is None:
            return _is_leaf(x)
        return number_of(node) >= self._first and (self._reached is None or self._reaches(node))

    def look(self, values: Iterable[object]) -> tuple[bool, bool]:
        """Whether any of some values depends on the leaves, and whether any is on the tape that does not.

        Raises:
            Live: one that depends on the leaves is a sparse tensor.
        """
        live = foreign = False
        for value in values:
            if isinstance(value, Tensor):
                if value.requires_grad or (transformed() and is_batched(value)):
                    if self.has(value):
                        if value.layout in SPARSE:
                            raise Live(value)
                        live = True
                    else:
                        foreign = True
            elif isinstance(value, list | tuple | dict):
                below = self.look(value.values() if isinstance(value, dict) else value)
                live, foreign = live or below[0], foreign or below[1]
        return live, foreign

    def is_hidden(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether anything in a call depends on the leaves that a transform other than ``torch.vmap`` wrapped.

        Derivatives by ``torch.func`` do so: what they compute comes onto the tape as none of the operations inside.
        """
        if not transformed():
            return False
        for x in tree_leaves((args, kwargs)):
            hidden = False
            while isinstance(x, Tensor) and is_wrapped(x):
                hidden = hidden or not is_batched(x)
                x = inside(x)
            if hidden and isinstance(x, Tensor) and self.has(x):
                return True
        return False

    def look_at_call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[bool, bool]:
        """The same of what a module is called with, however it is packed."""
        if len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, Tensor) and x.requires_grad:
                node = x.grad_fn
                simple = node is not None and self._reached is None
                live = number_of(node) >= self._first if simple else self.has(x)
                return live, not live
        return self.look(tree_leaves((args, kwargs)))

    def constants_off(self, tree: T, *, own: bool) -> T:
        """A nested structure with the constants in it taken off the tape.

        Args:
            tree: the structure.
            own: whether that includes what the model has put on the tape by itself, in order to differentiate.

        Raises:
            NotImplementedError: what looks like a constant came onto the tape in another thread.
        """

        def off(x: Tensor) -> Tensor:
            on = x.requires_grad or (transformed() and is_batched(x))
            if not on or self.has(x) or (not own and self._is_own(x)):
                return x
            if x.grad_fn is not None and self._is_of_another_thread(x.grad_fn):
                raise NotImplementedError(_IN_A_THREAD)
            return x.detach()

        return cast(T, tree_map_tensors(off, tree))

    def _is_of_another_thread(self, node: Node) -> bool:
        """Whether a node of a number from before the pass leads to its leaves: threads count each for itself."""
        ahead, seen = [node], {node}
        while ahead:
            now = ahead.pop()
            for parent, _ in now.next_functions:
                variable = getattr(parent, "variable", None)
                if isinstance(variable, Tensor):
                    if _is_leaf(variable) and number_of(now) >= self._first:
                        return True
                elif parent is not None and parent not in seen:
                    seen.add(parent)
                    ahead.append(parent)
        return False

    def _is_own(self, x: Tensor) -> bool:
        node = x.grad_fn
        return getattr(x, _OWN, False) is True if node is None else number_of(node) >= self._first

    def _reaches(self, node: Node) -> bool:
        """Whether the tape leads from a node to a leaf of the pass."""
        reached = self._reached
        assert reached is not None
        ahead = [node]
        while ahead:
            now = ahead[-1]
            if now in reached:
                ahead.pop()
                continue
            before = [parent for parent, _ in now.next_functions if parent is not None]
            unknown = [parent for parent in before if parent not in reached]
            if unknown and number_of(now) >= self._first:
                ahead += unknown
                continue
            variable = getattr(now, "variable", None)
            begins = isinstance(variable, Tensor) and _is_leaf(variable)
            reached[now] = begins or any(reached.get(parent, False) for parent in before)
            ahead.pop()
        return reached[node]
