"""Normalisation: which values are divided by a deviation together, and what of a difference each counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from tdhook.relevance.secants.averages import average
from tdhook.relevance.secants.pair import Grads, Pair, wide

__all__ = ["Normalisation", "held", "normalised"]


@dataclass
class Normalisation:
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
    def of(
        name: str, module: nn.Module | None, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Normalisation:
        """What a call normalises.

        Args:
            name: the operation, where no module is called.
            module: the module.
            x: what it is called with first.
            args: all of it.
            kwargs: all of it by name.
        """
        if module is None:
            return _of_operation(name, x, args, kwargs)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
        if isinstance(module, nn.GroupNorm):
            return Normalisation(_channels(weight, x), _channels(bias, x), eps, groups=module.num_groups)
        if isinstance(module, _NormBase):
            per_sample = isinstance(module, _InstanceNorm)
            groups = x.shape[1] if per_sample else 0
            return Normalisation(_channels(weight, x), _channels(bias, x), eps, groups=groups)
        centred = not any("RMSNorm" in cls.__name__ for cls in type(module).__mro__)
        trailing = len(getattr(module, "normalized_shape", (0,)))
        return Normalisation(weight, bias, eps, centred, trailing=trailing)

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


def _of_operation(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Normalisation:
    rest = list(args[1:])

    def argument(index: int, key: str, default: object = None) -> Any:
        return rest[index] if index < len(rest) else kwargs.get(key, default)

    if name in ("layer_norm", "rms_norm"):
        weight = argument(1, "weight")
        centred = name == "layer_norm"
        bias = argument(2, "bias") if centred else None
        eps = argument(3 if centred else 2, "eps", 1e-5 if centred else None)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return Normalisation(weight, bias, eps, centred, trailing=len(argument(0, "normalized_shape")))
    if name == "group_norm":
        weight, bias = (_channels(argument(i, key), x) for i, key in ((1, "weight"), (2, "bias")))
        return Normalisation(weight, bias, argument(3, "eps", 1e-5), groups=argument(0, "num_groups"))
    # torch.batch_norm and torch.instance_norm: weight, bias, mean, variance, training, momentum, eps, ...
    weight, bias = (_channels(rest[i], x) for i in (0, 1))
    return Normalisation(weight, bias, rest[6], groups=x.shape[1] if name == "instance_norm" else 0)


def normalised(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """All of it: a product of what is centred and of the inverse deviation, each counting by the other's mean.

    With ``z = c r``, ``dz = r_mid dc + c_mid dr``, and of ``r = v ** -0.5`` the secant is
    ``-(r r0) ** 2 / (r + r0)``, that of the variance ``v`` being ``2 c_mid / n``.
    """
    if len(pair.live) != 1:
        return average(pair, grads)
    return (_pulled(pair, grads[0], deviation=True),)


def held(pair: Pair, grads: Sequence[Tensor]) -> Grads:
    """With the deviation held constant, at the mean of both of its inverses."""
    return (_pulled(pair, grads[0], deviation=False), *(None for _ in pair.live[1:]))


def _pulled(pair: Pair, grad: Tensor, *, deviation: bool) -> Tensor:
    norm = Normalisation.of(pair.name, pair.module, pair.ends[0], *pair.arguments())
    x, start, grad = wide(pair.ends[0]), wide(pair.starts[0]), wide(grad)
    g = norm.rows(grad if norm.weight is None else grad * norm.weight.detach())
    c, before = _centred(norm, x), _centred(norm, start.expand_as(x))
    r, r0 = (torch.rsqrt(v.square().mean(-1, keepdim=True) + norm.eps) for v in (c, before))
    middle = (c + before) / 2
    pulled = g * ((r + r0) / 2)
    if deviation:
        shared = (g * middle).sum(-1, keepdim=True) * (r * r0).square() / (r + r0)
        pulled = pulled - shared * middle * (2 / x.numel() * c[..., 0].numel())
    if norm.centred:
        pulled = pulled - pulled.mean(-1, keepdim=True)
    return norm.back(pulled, x).to(pair.ends[0].dtype)


def _centred(norm: Normalisation, x: Tensor) -> Tensor:
    rows = norm.rows(x)
    return rows - rows.mean(-1, keepdim=True) if norm.centred else rows
