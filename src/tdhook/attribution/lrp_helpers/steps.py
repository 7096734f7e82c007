"""One executed step ``z = f(x)`` as a rule sees it: its values, and its vector-Jacobian product.

Rules are written once against :class:`Step`. Linear layers and convolutions have closed forms (no autograd inside the
backward pass); any other module is differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.accounting import Report

__all__ = ["ClosedForm", "LinearStep", "ModuleStep", "Step", "closed_form"]

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
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    report: Report | None = None
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
    def constants(self, modify: Modify) -> tuple[Tensor, ...]:
        """What is left of each output where all inputs are zero: the bias."""


class ModuleStep(Step):
    """A step without closed form, differentiated by autograd."""

    def __init__(
        self,
        module: nn.Module,
        evaluate: Callable[[Sequence[Tensor], Modify], Sequence[Tensor]],
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        graph: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.module, self.evaluate = module, evaluate
        self.inputs, self.outputs, self._graph, self.arguments = inputs, outputs, graph, arguments

    def vjp(self, *grads: Tensor) -> Grads:
        assert self._graph is not None, "the rule did not ask for the graph of the forward pass"
        return _pull_back(*self._graph, grads)

    def modified(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[tuple[Tensor, ...], Vjp]:
        leaves = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
        with torch.enable_grad():
            outputs = tuple(self.evaluate(leaves, modify))
        return tuple(z.detach() for z in outputs), lambda *grads: _pull_back(leaves, outputs, grads)

    def constants(self, modify: Modify) -> tuple[Tensor, ...]:
        zeros = [torch.zeros_like(x) if x.is_floating_point() else x for x in self.inputs]
        with torch.no_grad():
            return tuple(self.evaluate(zeros, modify))


def _pull_back(inputs: Sequence[Tensor], outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Grads:
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    live = [(z, g) for z, g in zip(outputs, grads, strict=True) if z.requires_grad]
    result: list[Tensor | None] = [None] * len(inputs)
    if wanted and live:
        pulled: Sequence[Tensor | None] = torch.autograd.grad(
            [z for z, _ in live],
            [inputs[i] for i in wanted],
            [g for _, g in live],
            retain_graph=True,
            allow_unused=True,
        )
        for i, g in zip(wanted, pulled, strict=True):
            result[i] = torch.zeros_like(inputs[i]) if g is None else g
    return tuple(result)


class ClosedForm(ABC):
    """A layer that is linear in its input, written out: ``z = A(w) x + b`` and ``A(w)^T g``."""

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``A(weight) x + bias``."""

    @abstractmethod
    def adjoint(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``A(weight)^T grad``; ``x`` gives the shape of the result."""

    @abstractmethod
    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight whose outputs are ``scale`` (one per output feature or channel) times as large."""

    @abstractmethod
    def along_outputs(self, values: Tensor, z: Tensor) -> Tensor:
        """``values`` (one per output feature or channel) shaped so that they broadcast against ``z``."""


class DenseForm(ClosedForm):
    """``nn.Linear``: ``[*batch, in]`` to ``[*batch, out]``."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def adjoint(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale.unsqueeze(-1)

    def along_outputs(self, values: Tensor, z: Tensor) -> Tensor:
        # Batch norm over [N, C, L] normalises axis 1 even where a linear layer made the last one.
        return values


class ConvForm(ClosedForm):
    """Convolutions in one to three dimensions, transposed or not: ``[N, C, *]`` or ``[C, *]``."""

    def __init__(self, layer: nn.modules.conv._ConvNd) -> None:
        self.transposed = layer.transposed
        self.rank = len(layer.kernel_size)
        self.groups = layer.groups
        padding: Sequence[int] | str = layer.padding
        self.pad_mode: str | None = None
        self.pads: list[int] = list(getattr(layer, "_reversed_padding_repeated_twice", []))
        if padding == "valid":
            padding = [0] * self.rank
        elif isinstance(padding, str) or layer.padding_mode != "zeros":
            # Asymmetric "same" padding and the modes that repeat the input are a step before the convolution.
            self.pad_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            padding = [0] * self.rank
        self.settings = (
            list(layer.stride),
            list(padding),
            list(layer.dilation),
            layer.transposed,
            list(layer.output_padding),
            layer.groups,
        )

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded, batched = self._pad(x)
        z = torch.convolution(padded, weight, bias, *self.settings)
        return z if batched else z.squeeze(0)

    def adjoint(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        padded, batched = self._pad(x)
        pulled: Tensor = torch.ops.aten.convolution_backward(
            grad if batched else grad.unsqueeze(0), padded, weight, None, *self.settings, [True, False, False]
        )[0]
        if self.pad_mode == "constant":
            for axis in range(self.rank):
                before, size = self.pads[2 * axis], x.shape[-1 - axis]
                pulled = pulled.narrow(-1 - axis, before, size)
        elif self.pad_mode is not None:
            pulled = self._unpad(pulled, x if batched else x.unsqueeze(0))
        return pulled if batched else pulled.squeeze(0)

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        trailing = (1,) * self.rank
        if not self.transposed:
            return weight * scale.view(-1, 1, *trailing)
        inputs, per_group = weight.shape[:2]
        grouped = weight.view(self.groups, inputs // self.groups, per_group, *weight.shape[2:])
        return (grouped * scale.view(self.groups, 1, per_group, *trailing)).view_as(weight)

    def along_outputs(self, values: Tensor, z: Tensor) -> Tensor:
        return values.view(-1, *(1,) * self.rank)

    def _pad(self, x: Tensor) -> tuple[Tensor, bool]:
        batched = x.dim() == self.rank + 2
        x = x if batched else x.unsqueeze(0)
        return (x if self.pad_mode is None else F.pad(x, self.pads, self.pad_mode)), batched

    def _unpad(self, grad: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = torch.empty_like(x).requires_grad_()
            assert self.pad_mode is not None
            padded = F.pad(leaf, self.pads, self.pad_mode)
        return torch.autograd.grad(padded, leaf, grad)[0]


class LinearStep(Step):
    """A linear layer or convolution, in closed form.

    Args:
        module: the layer, ``form``: how it computes.
        x: its input, ``outputs``: what it returned (empty unless asked for), ``weight``, ``bias``: its parameters.
        affine: scale and shift, one per output feature or channel, of the batch normalisation that is merged into the
            layer.
    """

    def __init__(
        self,
        module: nn.Module,
        form: ClosedForm,
        x: Tensor,
        outputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module, self.form, self.inputs = module, form, (x,)
        if affine is not None:
            scale, shift = affine
            weight = form.scale_outputs(weight, scale)
            bias = shift if bias is None else bias * scale + shift
            outputs = tuple(form.along_outputs(scale, z) * z + form.along_outputs(shift, z) for z in outputs)
        self.outputs, self.weight, self.bias = outputs, weight, bias

    def vjp(self, *grads: Tensor) -> Grads:
        return (self.form.adjoint(grads[0], self.inputs[0], self.weight),)

    def modified(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[tuple[Tensor, ...], Vjp]:
        (x,) = inputs
        weight = modify("weight", self.weight)
        bias = None if self.bias is None else modify("bias", self.bias)
        return (self.form.apply(x, weight, bias),), lambda grad: (self.form.adjoint(grad, x, weight),)

    def constants(self, modify: Modify) -> tuple[Tensor, ...]:
        zero = torch.zeros_like(self.inputs[0])
        return self.modified((zero,), modify)[0]


_DENSE = DenseForm()
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_FORWARDS = {cls.forward for cls in _CONVOLUTIONS}
_CONV_CORES = {cls._conv_forward for cls in _CONVOLUTIONS}


def closed_form(module: nn.Module) -> ClosedForm | None:
    """The closed form of a module, or ``None``: a subclass that computes in its own way is differentiated."""
    cls = type(module)
    if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return _DENSE
    if isinstance(module, _CONVOLUTIONS):
        standard = cls.forward in _CONV_FORWARDS and getattr(cls, "_conv_forward", None) in _CONV_CORES
        return ConvForm(module) if standard else None
    return None
