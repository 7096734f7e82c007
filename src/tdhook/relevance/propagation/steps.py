"""One executed step ``z = f(x)`` as a rule sees it: its values, and its vector-Jacobian product.

Rules are written once against :class:`Step`. Linear layers and convolutions have closed forms (no autograd inside the
backward pass); any other module is differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.forms import ClosedForm
from tdhook.relevance.propagation.reporting import Report
from tdhook.relevance.propagation.weights import WeightCache
from tdhook.tape.dependence import leaf
from tdhook.tape.own import OwnTape
from tdhook.tape.sharded import added_up

__all__ = ["Affine", "Grads", "LinearStep", "Modify", "ModuleStep", "Step", "unmodified"]

Grads: TypeAlias = tuple["Tensor | None", ...]
Vjp: TypeAlias = Callable[..., Grads]
Modify: TypeAlias = Callable[[str, Tensor], Tensor]


class Step(ABC):
    """A module call during the backward pass.

    Attributes:
        module: the module.
        inputs: the tensors that went in, detached.
        outputs: the tensors that came out, detached; empty unless the rule asked for them.
        report: where to report ``(reason, amount)`` of what the rule keeps, if anyone wants to know.
        arguments: positional and keyword arguments of the call; ``None`` stands for the inputs.
        nonnegative: whether no input can be negative, as far as that is known.
        writable: whether what the step computes belongs to who asked for it, and may be overwritten.
        origin: where inputs and outputs are differences from a reference, the input there.
        differs: whether anything else differs there.
    """

    arguments: tuple[tuple[object, ...], dict[str, object]] = ((), {})
    report: Report | None = None
    nonnegative: bool = False
    writable: bool = False
    origin: Tensor | None = None
    differs: bool = False
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @abstractmethod
    def vjp(self, *grads: Tensor) -> Grads:
        """Pull ``grads`` (one per output) back through the step as it was executed."""

    @abstractmethod
    def modified(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[tuple[Tensor, ...], Vjp]:
        """Evaluate the step at other inputs and with modified parameters: the outputs and the pull-back there."""

    @abstractmethod
    def constants(self, modify: Modify) -> tuple[Tensor | None, ...]:
        """What is left of each output where all inputs are zero: the bias, in a shape that broadcasts, if any."""


class ModuleStep(Step):
    """A step without closed form, differentiated by autograd."""

    def __init__(
        self,
        module: nn.Module,
        evaluate: Callable[[Sequence[Tensor], Modify], Sequence[Tensor]],
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        tape: OwnTape | None,
        arguments: tuple[tuple[object, ...], dict[str, object]],
    ) -> None:
        self.module, self.evaluate = module, evaluate
        self.inputs, self.outputs, self._tape, self.arguments = inputs, outputs, tape, arguments

    def vjp(self, *grads: Tensor) -> Grads:
        assert self._tape is not None, "the rule did not ask for the tape of the forward pass"
        return self._tape.pull(grads, zeros=True)

    def modified(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[tuple[Tensor, ...], Vjp]:
        leaves = tuple(leaf(x) if x.is_floating_point() else x for x in inputs)
        with torch.enable_grad():
            outputs = tuple(self.evaluate(leaves, modify))
        tape = OwnTape(leaves, outputs)
        return tuple(z.detach() for z in outputs), lambda *grads: tape.pull(grads, zeros=True)

    def constants(self, modify: Modify) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros_like(x) if x.is_floating_point() else x for x in self.inputs]
        with torch.no_grad():
            return tuple(self.evaluate(zeros, modify))


def unmodified(name: str, param: Tensor) -> Tensor:
    """The parameter as it is: a :data:`Modify`."""
    return param


@dataclass
class Affine:
    """Batch normalisation in evaluation, as ``scale * x + shift``.

    Attributes:
        scale: factors of shape ``[channels]``, and ``shift``: summands, likewise.
        sources: what the scale was computed from.
    """

    scale: Tensor
    shift: Tensor
    sources: tuple[Tensor, ...]

    @staticmethod
    def of(module: nn.Module) -> Affine:
        """A batch norm as it is in evaluation."""
        norm: Any = module
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            shift = -norm.running_mean * scale
            if norm.bias is not None:
                shift = shift + norm.bias
        sources = (norm.running_var,) if norm.weight is None else (norm.running_var, norm.weight)
        return Affine(scale, shift, sources)

    def to(self, dtype: torch.dtype) -> Affine:
        """The same in another precision."""
        return Affine(self.scale.to(dtype), self.shift.to(dtype), self.sources)


class LinearStep(Step):
    """A linear layer or convolution, in closed form.

    Args:
        layer: the layer, ``form``: how it computes.
        x: its input, ``outputs``: what it returned (empty unless asked for), ``weight``, ``bias``: its parameters.
        merged: the batch normalisation that is merged into the layer, if any.
        cache: keeps modified weights, if any.
        origin: the input on a reference, if ``x`` and ``outputs`` are differences from it: there are no biases in them.
    """

    writable = True

    def __init__(
        self,
        layer: nn.Module,
        form: ClosedForm,
        x: Tensor,
        outputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        merged: Affine | None = None,
        cache: WeightCache | None = None,
        origin: Tensor | None = None,
    ) -> None:
        self.origin = origin
        self.module, self.form, self.inputs = layer, form, (x,)
        self._sources: tuple[Tensor, ...] = (weight,)
        self._merged, self._cache = merged, cache
        if merged is not None:
            self._sources += merged.sources
            bias = merged.shift if bias is None else bias * merged.scale + merged.shift
            outputs = tuple(form.along_outputs(merged.scale, z) * z for z in outputs)
            if origin is None:
                outputs = tuple(z + form.along_outputs(merged.shift, z) for z in outputs)
        bias = None if origin is not None else bias
        self.outputs, self._weight, self._bias = tuple(map(added_up, outputs)), weight, bias

    def vjp(self, *grads: Tensor) -> Grads:
        return (added_up(self.form.adjoint(grads[0], self.inputs[0], self.weight(unmodified))),)

    def modified(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[tuple[Tensor, ...], Vjp]:
        (x,) = inputs
        weight = self.weight(modify)
        bias = None if self._bias is None else modify("bias", self._bias)
        z = added_up(self.form.apply(x, weight, bias))
        return (z,), lambda grad: (added_up(self.form.adjoint(grad, x, weight)),)

    def weight(self, modify: Modify) -> Tensor:
        """The layer's weight, modified."""
        if self._cache is None or (self._merged is None and modify is unmodified):
            return self._made(modify)
        return self._cache.get(self.module, modify, self._sources, lambda: self._made(modify))

    def _made(self, modify: Modify) -> Tensor:
        weight = self._weight
        if self._merged is not None:
            weight = self.form.scale_outputs(weight, self._merged.scale)
        return modify("weight", weight)

    def constants(self, modify: Modify) -> tuple[Tensor | None, ...]:
        if self._bias is None:
            return (None,)
        return (self.form.along_outputs(modify("bias", self._bias), self.inputs[0]),)
