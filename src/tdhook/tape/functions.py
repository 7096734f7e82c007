"""The tape of autograd: what is on it, who made a value, and identities that are put on it."""

from __future__ import annotations

from cmath import isfinite
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.autograd.graph import Node, get_gradient_edge

from tdhook.tape.copies import clones, copied
from tdhook.tape.internals import inside, is_batched, is_wrapped, maker_of, transformed
from tdhook.tape.trees import tree_map_tensors
from tdhook.tape.undoing import set_to

__all__ = [
    "Context",
    "Identity",
    "TapeFunction",
    "alias",
    "another",
    "apart",
    "copy_of",
    "copying",
    "independent",
    "is_identity",
    "live",
    "may_ask_of",
    "may_look_at",
    "nodes_behind",
    "on_tape",
    "parts",
    "turn_of",
    "turned",
    "unwrapped",
    "whole",
]

K = TypeVar("K", bound=Hashable)


def unwrapped(x: Tensor) -> Tensor:
    """The tensor inside those that ``torch.vmap`` wraps around it."""
    while is_batched(x):
        x = inside(x)
    return x


def on_tape(x: Tensor) -> bool:
    """Whether gradients flow to ``x``; under ``torch.vmap`` it is the tensor inside that knows."""
    if x.requires_grad or not transformed():
        return x.requires_grad
    while is_batched(x):
        x = inside(x)
        if x.requires_grad:
            return True
    return False


def nodes_behind(
    starts: Iterable[Node | None], beside: Callable[[Node], Iterable[Node]] = lambda node: ()
) -> Iterator[Node]:
    """Some nodes of the tape and all that lead to them, each once.

    Args:
        starts: the nodes; ``None`` is what a tensor off the tape has.
        beside: further nodes that one leads on to.
    """
    seen: set[Node] = set()
    ahead = list(starts)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]
        ahead += beside(node)


def independent(tensors: Mapping[K, Tensor]) -> list[list[K]]:
    """Names of tensors in groups, each of which depends on none of its own group, the nearest to the inputs first."""
    nodes = {key: get_gradient_edge(x).node for key, x in tensors.items()}
    before = {key: {*nodes_behind([node])} - {node} for key, node in nodes.items()}
    levels: dict[K, int] = {}
    for key in sorted(tensors, key=lambda key: len(before[key])):  # what is behind has more before it
        deeper = [levels[other] for other, node in nodes.items() if other != key and node in before[key]]
        levels[key] = 1 + max(deeper, default=-1)
    groups: dict[int, list[K]] = {}
    for key in tensors:
        groups.setdefault(levels[key], []).append(key)
    return [groups[depth] for depth in sorted(groups)]


def live(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to all tensors of a nested structure that gradients flow to."""
    return tree_map_tensors(lambda x: function(x) if on_tape(x) else x, tree)


def may_look_at(x: Tensor) -> bool:
    """Whether what is done may depend on values of ``x``: not in a graph that is traced, nor on a batch of tensors."""
    return may_ask_of(x) and not torch.compiler.is_compiling()


def may_look_at_once(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for them: on a processor."""
    return x.is_cpu and may_look_at(x)


def seen_finite(x: Tensor) -> bool:
    """Whether all values are seen to be finite, where one can look without waiting: a sum tells, and costs little.

    On a processor, choosing by a condition takes as long as ten sums, so that it is left to those who need it.
    """
    return may_look_at_once(x) and isfinite(x.sum().item())


def may_ask_of(*tensors: Tensor) -> bool:
    """Whether a condition on values can be found out, at once or later: not of a batch of tensors."""
    return not (transformed() and any(map(is_wrapped, tensors)))


def parts(x: Tensor) -> Tensor:
    """Real numbers as they are; complex ones as the two numbers that they are, each with relevance of its own."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`parts`."""
    return torch.view_as_complex(x) if like.is_complex() else x


_COPIES: ContextVar[bool] = ContextVar("copies", default=False)


@contextmanager
def copying() -> Iterator[None]:
    """Make these identities return copies, which may be overwritten, where they return views else."""
    with set_to(_COPIES, True):
        yield


def copy_of(x: Tensor) -> Tensor:
    """A copy that lies in memory as ``x`` does (:func:`~tdhook.tape.copies.copied`), on the tape if ``x`` is."""
    if clones(x):
        return x.clone()
    made: Tensor = _Copied.apply(x)
    return made


def apart(x: Tensor, *, always: bool = False) -> Tensor:
    """The tensor itself, or within :func:`copying` a copy, so that ``x`` stays what it is whatever is overwritten.

    Behind the copy it is seen what made ``x`` (:meth:`Identity.before`).
    """
    if not always and not _COPIES.get():
        return x
    made: Tensor = _Copied.apply(x)
    return made


def alias(x: Tensor) -> Tensor:
    """Another tensor of the same values: a view, or a copy within :func:`copying`."""
    return copy_of(x) if _COPIES.get() else x.view_as(x)


class Context(Protocol):
    """What a call of a function keeps between its forward and its backward pass."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What was saved, of which some may be ``None``."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors that came in or go out."""

    def set_materialize_grads(self, value: bool) -> None:
        """Whether outputs to which nothing comes are given zeros in the backward pass."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Say of outputs that no gradient comes to them."""


class TapeFunction(Function):
    """A function with a backward pass of its own, written once in the form that ``torch.vmap`` can batch.

    Where nothing transforms it, the same runs in one piece, which costs half as much.
    """

    generate_vmap_rule = True
    _in_one_piece: ClassVar[Callable[..., object]]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "_is_piece" in cls.__dict__:
            return

        run, keep = cls.forward, cls.setup_context

        def forward(ctx: Any, *inputs: Any) -> object:
            outputs = run(*inputs)
            keep(ctx, inputs, outputs)
            return outputs

        namespace = {
            "__doc__": cls.__doc__,
            "_is_piece": True,
            "generate_vmap_rule": False,
            "forward": staticmethod(forward),
            "setup_context": staticmethod(Function.setup_context),
        }
        make: Any = type(cls)
        piece = make(cls.__name__, (cls,), namespace)
        cls._in_one_piece = super(Function, piece).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *inputs: object) -> Any:
        """Run it, and put it on the tape."""
        if transformed():
            return super().apply(*inputs)
        return cls._in_one_piece(*inputs)


class Identity(TapeFunction):
    """Returns its first argument, of the same values; what travels backwards may change there."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "_is_piece" in cls.__dict__:
            return
        keep = cls.setup_context

        def marked(ctx: Any, inputs: Any, output: Any) -> None:
            keep(ctx, inputs, output)
            ctx.is_identity = True

        # Inside torch.vmap a class of torch's own stands for this one.
        cls.setup_context = staticmethod(marked)  # type: ignore[method-assign]

    @staticmethod
    def before(node: Any) -> tuple[Any, Sequence[Any]]:
        """The first node from ``node`` towards the inputs that is no identity, and the identities before it."""
        passed: list[object] = []
        while True:
            if not is_identity(node):
                return node, passed
            passed.append(node)
            node = node.next_functions[0][0]


def is_identity(node: object) -> bool:
    """Whether an :class:`Identity` made a node of the tape; inside torch.vmap a class of torch's stands for it."""
    made = maker_of(node)
    return made is not None and (issubclass(made, Identity) or getattr(node, "is_identity", False))


def another(x: Tensor) -> Tensor:
    """Another value on the tape, of which :meth:`Identity.before` finds what made ``x``."""
    made: Tensor = _Another.apply(x)
    return made


def turned(x: Tensor, axis: int, to: int) -> Tensor:
    """Another value on the tape, with an axis elsewhere, of which :meth:`Identity.before` finds what made ``x``."""
    made: Tensor = _Turned.apply(x, axis, to)
    return made


def turn_of(passed: Iterable[Any]) -> tuple[int, int]:
    """Which axis lies elsewhere behind identities, and where, if what was turned was turned back but for once."""
    turns: list[tuple[int, int]] = [node.turn for node in passed if getattr(node, "turn", None) is not None]
    return turns[0] if len(turns) % 2 else (0, 0)


class _Another(Identity):
    """The same values."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return alias(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> object:
        return grad


class _Turned(Identity):
    """The same values, of which one axis lies elsewhere."""

    @staticmethod
    def forward(x: Tensor, axis: int, to: int) -> Tensor:
        moved = x.movedim(axis, to)
        return copy_of(moved) if _COPIES.get() else moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.turn = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        axis, to = ctx.turn
        return grad.movedim(to, axis), None, None


class _Copied(_Another):
    """A copy that lies in memory as its argument does."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return copied(x)
