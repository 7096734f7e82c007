"""Pairs: one call of a function, beside the same call on a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tdhook.tape.dependence import leaf
from tdhook.tape.functions import parts, seen_finite
from tdhook.tape.internals import transformed
from tdhook.tape.own import NoDerivative, OwnTape
from tdhook.tape.trees import Shape, tree_leaves, tree_unflatten

__all__ = ["Grads", "Pair", "Pull", "difference", "inner", "pull_back", "wide"]

Grads: TypeAlias = "tuple[Tensor | None, ...]"
Pull: TypeAlias = "Callable[[Pair, Sequence[Tensor]], Grads]"
"""Given what each output counts per unit, what each input counts: in sum over the differences they agree."""


@dataclass
class Pair:
    """One call, with what went in and out of it, and the same of the call on the reference.

    Attributes:
        name: the name of the operation, or of the module's class.
        module: the module; ``None`` for an operation.
        function: what is called.
        leaves: the leaves of its arguments, ``spec``: how these are packed.
        live: which of the leaves are attributed.
        ends: the values of these, ``starts``: likewise, on the reference.
        outputs: the tensors that it returned, ``before``: likewise, on the reference.
        beside: other tensors among the leaves that differ on the reference, by index: their values there.
        other: whether plain numbers do.
        chosen: whether that was picked on the reference which is picked in the call.
    """

    name: str
    module: nn.Module | None
    function: Callable[..., Any]
    leaves: Sequence[Any]
    spec: Shape
    live: tuple[int, ...]
    ends: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    beside: Mapping[int, Tensor] = field(default_factory=dict)
    other: bool = False
    chosen: bool = False

    @property
    def differs(self) -> bool:
        """Whether anything else differs on the reference than what is attributed."""
        return self.other or bool(self.beside)

    @property
    def rises(self) -> tuple[Tensor, ...]:
        """The differences of the outputs."""
        return tuple(map(difference, self.outputs, self.before))

    @property
    def steps(self) -> tuple[Tensor, ...]:
        """The differences of the inputs."""
        return tuple(map(difference, self.ends, self.starts))

    def shape_of(self, index: int) -> torch.Size:
        """The shape of a leaf that is attributed."""
        return self.ends[self.live.index(index)].shape

    def argument(self, index: int, name: str, default: object = None) -> Any:
        """An argument of the call, by place or by name."""
        args, kwargs = self.arguments()
        return args[index] if len(args) > index else kwargs.get(name, default)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def given(
        self, inputs: Sequence[Tensor], others: Mapping[int, Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with other inputs, and with other tensors beside them, by index."""
        leaves = list(self.leaves)
        for i, x in zip(self.live, inputs, strict=True):
            leaves[i] = x
        for i, x in (others or {}).items():
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def between(self, place: float) -> tuple[list[Tensor], dict[int, Tensor]]:
        """What goes in on the way from the reference (0) to the call (1), and what differs beside it by index."""
        inputs = [_mixed(s, x, place) for s, x in zip(self.starts, self.ends, strict=True)]
        moving = [i for i, start in self.beside.items() if start.is_floating_point() or start.is_complex()]
        others = {i: _mixed(self.beside[i], self.leaves[i], place) for i in moving}
        return inputs, others

    def run(self, inputs: Sequence[Tensor], others: Mapping[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The tensors that the call returns for other inputs."""
        args, kwargs = self.given(inputs, others)
        result = self.function(*args, **kwargs)
        return tuple(z for z in tree_leaves(result) if isinstance(z, Tensor))

    def pull(self, place: float, grads: Sequence[Tensor]) -> tuple[Grads, dict[int, Tensor]]:
        """The vector-Jacobian product on the way: for the inputs, and for what differs beside them."""
        inputs, others = self.between(place)

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            return self.run(values[: len(inputs)], dict(zip(others, values[len(inputs) :], strict=True)))

        try:
            found = pull_back(run, [*inputs, *others.values()], grads)
        except NoDerivative:
            raise NoDerivative(f"`{self.name}`") from None
        except RuntimeError as error:
            if not others or "not differentiable with respect to" not in str(error):
                raise
            # Torch has no derivative of what is beside: of the weights of classes in a loss, say.
            return pull_back(lambda *values: self.run(values, others), inputs, grads), {}
        rest = {i: g for i, g in zip(others, found[len(inputs) :], strict=True) if g is not None}
        return found[: len(inputs)], rest


def pull_back(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Grads:
    """The vector-Jacobian product of a function, also inside ``torch.vmap``."""
    if not transformed():
        leaves = [leaf(x) for x in inputs]
        with torch.enable_grad():
            outputs = function(*leaves)
        return OwnTape(leaves, outputs).pull(grads)
    kinds: list[bool] = []

    def differentiable(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = function(*values)
        kinds[:] = [z.is_floating_point() or z.is_complex() for z in outputs]
        return tuple(z for z, kind in zip(outputs, kinds, strict=True) if kind)

    pull = torch.func.vjp(differentiable, *inputs)[1]
    found: Grads = pull(tuple(g for g, kind in zip(grads, kinds, strict=True) if kind))
    return found


def difference(x: Tensor, start: Tensor) -> Tensor:
    """``x - start``; nothing where both are infinite, as masks are, or whole numbers."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.zeros_like(x)
    step = x - start
    return step if seen_finite(step) else torch.where(x == start, 0.0, step)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Products of two tensors, of complex ones as pairs of real ones; nothing where either is not finite."""
    product = parts(a) * parts(b)
    return product if seen_finite(product) else torch.where(product.isfinite(), product, 0.0)


def wide(x: Tensor) -> Tensor:
    """The same values in the precision to compute in, which is single where they are in half.

    Squares are soon too large for float16, and sums too long for bfloat16.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mixed(start: Tensor, end: Tensor, place: float) -> Tensor:
    if place == 1.0:
        return end
    mixed = torch.lerp(start, end, place)
    if seen_finite(mixed):
        return mixed
    # Where both are infinite (masks) they are no different, and a difference of what is large may be infinite.
    return torch.where(start == end, end, start * (1 - place) + end * place)
