"""Layers that are linear in their input, written out, so that nothing need be differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from tdhook.models.parallel import forward_put_on, is_of_torch
from tdhook.relevance.propagation.lent import are_lent
from tdhook.relevance.propagation.operation import Operation
from tdhook.tape.internals import children_of

__all__ = ["DENSE", "ClosedForm", "ConvForm", "Convolution", "DenseForm", "closed_form", "makes_weights"]


class ClosedForm(ABC):
    """A layer that is linear in its input, written out: ``z = A(w) x + b`` and ``A(w)^T g``.

    Attributes:
        settled: whether it depends on nothing but the class of the layer.
    """

    settled: ClassVar[bool] = False

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
    def output_axis(self, n_axes: int) -> int:
        """Which axis of an output of so many holds the output features or channels."""

    @abstractmethod
    def along_outputs(self, values: Tensor, z: Tensor) -> Tensor:
        """``values`` (one per output feature or channel) shaped so that they broadcast against ``z``."""


class DenseForm(ClosedForm):
    """``nn.Linear``: ``[*batch, in]`` to ``[*batch, out]``."""

    settled: ClassVar[bool] = True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def adjoint(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def scale_outputs(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale.unsqueeze(-1)

    def output_axis(self, n_axes: int) -> int:
        return n_axes - 1

    def along_outputs(self, values: Tensor, z: Tensor) -> Tensor:
        # Batch norm over [N, C, L] normalises axis 1 even where a linear layer made the last one.
        return values


class Convolution(NamedTuple):
    """What a convolution that is no layer is called with, as a layer holds it."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str = "zeros"


class ConvForm(ClosedForm):
    """Convolutions in one to three dimensions, transposed or not: ``[N, C, *]`` or ``[C, *]``."""

    def __init__(self, layer: _ConvNd | Convolution) -> None:
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
        # A convolution the other way round, which does not look at the input: many gradients need no copies of it.
        stride, padding, dilation, transposed, _, groups = self.settings
        missing = [0] * self.rank
        if not transposed:
            sizes = zip(
                padded.shape[2:],
                grad.shape[-self.rank :],
                weight.shape[2:],
                stride,
                padding,
                dilation,
                strict=True,
            )
            missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
        pulled = torch.convolution(
            grad if batched else grad.unsqueeze(0),
            weight,
            None,
            stride,
            padding,
            dilation,
            not transposed,
            missing,
            groups,
        )
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

    def output_axis(self, n_axes: int) -> int:
        return n_axes - self.rank - 1

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


DENSE = DenseForm()
"""That of all linear layers."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_FORWARDS = {cls.forward for cls in _CONVOLUTIONS}
_CONV_CORES = {cls._conv_forward for cls in _CONVOLUTIONS}


_FORMS: WeakKeyDictionary[nn.Module, tuple[object, ConvForm]] = WeakKeyDictionary()


def makes_weights(module: nn.Module) -> bool:
    """Whether a layer may compute with other weights than it holds, which it makes in its forward.

    So may all that are no layers of torch: they standardise their weights, say, or are parametrised.
    """
    parametrized = is_parametrized(module)
    if isinstance(module, Operation) or (is_of_torch(module) and not parametrized):
        return False
    layer = parametrized or isinstance(module, nn.Linear | _ConvNd)
    if (
        children_of(module) and not layer
    ):  # what makes weights for a layer is none of the layers that it consists of
        return False
    return closed_form(module) is None and any(parameter.dim() > 1 for parameter in module.parameters())


def closed_form(module: nn.Module) -> ClosedForm | None:
    """The closed form of a module, or ``None``: what computes in its own way is differentiated.

    That is a subclass, a layer that was given another forward, and a parametrised one, which makes its weight each time
    that it is read. The forward that offloading puts on a layer brings the weight that it computes with.
    """
    cls = type(module)
    # Modules that torch.jit compiled have no forward that could be asked for.
    forward = getattr(cls, "forward", None)
    if children_of(module) and is_parametrized(module):
        return None
    if forward_put_on(module) is not None and not are_lent(module):
        return None
    if forward is nn.Linear.forward:
        return DENSE
    if forward not in _CONV_FORWARDS or getattr(cls, "_conv_forward", None) not in _CONV_CORES:
        return None
    layer: Any = module
    settings = (
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.output_padding,
        layer.groups,
        layer.padding_mode,
    )
    known = _FORMS.get(module)
    if known is None or known[0] != settings:
        known = _FORMS[module] = settings, ConvForm(layer)
    return known[1]
