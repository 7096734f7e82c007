"""Normalisation with its statistics held constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.gradient import GradientRule

__all__ = ["LayerNormRule"]


class LayerNormRule(GradientRule):
    """Normalisation with its standard deviation held constant (Ali et al. 2022; AttnLRP, Prop. 3.4).

    With ``n`` normalised values, ``g_x = (w g_z - mean(w g_z)) / sqrt(var(x) + eps)``; for RMS normalisation
    ``g_x = w g_z / sqrt(mean(x^2) + eps)``. A module has ``weight`` (or none) and ``eps``; the values are normalised
    over the axes of ``normalized_shape``, or over the last one. Group, instance and (in training) batch normalisation
    normalise over their groups, channels and batches.
    """

    reruns = False

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        norm = _Norm.of(step)
        (x, *others), (g, *_) = step.inputs, relevance
        # As torch does: squares are soon too large for float16, and sums too long for bfloat16.
        rows, g = norm.rows(x.to(_wide(x.dtype))), g.to(_wide(g.dtype))
        if step.report is not None and norm.bias is not None:
            step.report("bias", g * norm.bias)
        g = norm.rows(g if norm.weight is None else g * norm.weight.detach())
        if norm.centred:
            variance = rows.var(-1, keepdim=True, correction=0)
            pulled = (g - g.mean(-1, keepdim=True)) * torch.rsqrt(variance + norm.eps)
        else:
            pulled = g * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps)
        return norm.back(pulled, x).to(x.dtype), *(None for _ in others)

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if isinstance(module, Operation):
            return
        super().check(module, inputs, outputs)
        if not hasattr(module, "eps") and not hasattr(module, "variance_epsilon"):
            raise ValueError(
                f"LayerNormRule fits modules with `weight`, `bias` and `eps`, which {type(module).__name__} has not"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision to sum up in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass
class _Norm:
    """Which values are normalised together.

    Attributes:
        weight: factors that broadcast against the output, if any, and ``bias``: summands likewise.
        eps: what is added to the variance.
        centred: whether the mean is taken off.
        trailing: how many of the last axes are normalised together; or
        groups: into how many groups the channels (axis 1) of each sample fall; 0 for one group per channel of all
            samples.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = True
    trailing: int = 0
    groups: int = 0

    @staticmethod
    def of(step: Step) -> _Norm:
        """What a module or an operation normalises."""
        module: Any = step.module
        x = step.inputs[0]
        if isinstance(module, Operation):
            return _of_operation(module.name, x, *step.arguments)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
        if isinstance(module, nn.GroupNorm):
            return _Norm(_channels(weight, x), _channels(bias, x), eps, groups=module.num_groups)
        if isinstance(module, _NormBase):
            per_sample = isinstance(module, _InstanceNorm)
            groups = x.shape[1] if per_sample else 0
            return _Norm(_channels(weight, x), _channels(bias, x), eps, groups=groups)
        centred = not any("RMSNorm" in cls.__name__ for cls in type(module).__mro__)
        return _Norm(weight, bias, eps, centred, trailing=len(getattr(module, "normalized_shape", (0,))))

    def rows(self, x: Tensor) -> Tensor:
        """``x`` with what is normalised together along its last axis."""
        if self.trailing:
            return x.flatten(-self.trailing) if self.trailing > 1 else x
        if self.groups:
            return x.reshape(x.shape[0], self.groups, -1)
        return x.transpose(0, 1).flatten(1)

    def back(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        if self.trailing or self.groups:
            return rows.reshape(x.shape)
        return rows.reshape(x.transpose(0, 1).shape).transpose(0, 1)


def _channels(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.view(-1, *(1,) * (x.dim() - 2))


def _of_operation(name: str, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> _Norm:
    rest = list(args[1:])

    def argument(index: int, key: str, default: object = None) -> Any:
        return rest[index] if index < len(rest) else kwargs.get(key, default)

    if name in ("layer_norm", "rms_norm"):
        weight = argument(1, "weight")
        centred = name == "layer_norm"
        bias = argument(2, "bias") if centred else None
        eps = argument(3 if centred else 2, "eps", 1e-5 if centred else None)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return _Norm(weight, bias, eps, centred, trailing=len(argument(0, "normalized_shape")))
    if name == "group_norm":
        weight, bias = (_channels(argument(i, key), x) for i, key in ((1, "weight"), (2, "bias")))
        return _Norm(weight, bias, argument(3, "eps", 1e-5), groups=argument(0, "num_groups"))
    # torch.batch_norm and torch.instance_norm: weight, bias, mean, variance, training, momentum, eps, ...
    weight, bias = (_channels(rest[i], x) for i in (0, 1))
    return _Norm(weight, bias, rest[6], groups=x.shape[1] if name == "instance_norm" else 0)
