"""Normalisation with its statistics held constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.models.parallel import is_of_torch
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.gradient import GradientRule
from tdhook.relevance.secants.norms import Normalisation, held, normalised
from tdhook.relevance.secants.pair import Pair, wide
from tdhook.tape.conditions import holds

__all__ = ["LayerNormRule"]

_FAR = 0.05
"""Farther off than rounding to bfloat16 makes values, as a share of the largest."""


class LayerNormRule(GradientRule):
    """Normalisation with its standard deviation held constant (Ali et al. 2022; AttnLRP, Prop. 3.4).

    With ``n`` normalised values, ``g_x = (w g_z - mean(w g_z)) / sqrt(var(x) + eps)``; for RMS normalisation
    ``g_x = w g_z / sqrt(mean(x^2) + eps)``. A module has ``weight`` (or none) and ``eps``; the values are normalised
    over the axes of ``normalized_shape``, or over the last one. Group, instance and (in training) batch normalisation
    normalise over their groups, channels and batches.

    Args:
        held: how much of the deviation is held constant: all of it (1) or none (0), which leaves the gradient,
            ``g_x - (1 - held) y mean(w g_z y) / sqrt(var(x) + eps)`` with ``y`` normalised. Relevance of what is not
            held is absorbed.

    Raises:
        ValueError: ``held`` is none of 0 to 1; on the forward pass, where a module computes something else.
    """

    reruns = False

    def __init__(self, held: float = 1.0) -> None:
        super().__init__()
        if not 0 <= held <= 1:
            raise ValueError(f"held is a part of the deviation, a number from 0 to 1, got {held!r}")
        self.held = float(held)

    @property
    def requires_operation(self) -> bool:
        """Where it is another one than that of normalisations inside a module by default."""
        return self.held < 1

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (x, *others), (g, *_) = step.inputs, relevance
        module = None if isinstance(step.module, Operation) else step.module
        norm = Normalisation.of(type(step.module).__name__, module, x, *step.arguments)
        # As torch does.
        rows, g = norm.rows(wide(x)), wide(g)
        if step.report is not None and norm.bias is not None:
            step.report("bias", g * norm.bias)
        g = norm.rows(g if norm.weight is None else g * norm.weight.detach())
        centred = rows - rows.mean(-1, keepdim=True) if norm.centred else rows
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
        pulled = ((g - g.mean(-1, keepdim=True)) if norm.centred else g) * inverse
        if self.held < 1:
            unit = centred * inverse
            followed = (1 - self.held) * inverse * unit * (g * unit).mean(-1, keepdim=True)
            if step.report is not None:
                step.report("constant", norm.back(rows * followed, x))
            pulled = pulled - followed
        return norm.back(pulled, x).to(x.dtype), *(None for _ in others)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """With the mean of both inverse deviations, whose difference takes what is its own."""
        if self.applied:
            return super().against(module, flow)
        return secant(module, flow, held if self.held == 1 else self._partly, keeps=True)

    def _partly(self, pair: Pair, grads: Sequence[Tensor]) -> Grads:
        """Some of it held, the rest by its secant."""
        one, other = held(pair, grads), normalised(pair, grads)
        return tuple(
            a if b is None else (1 - self.held) * b if a is None else torch.lerp(b, a, self.held)
            for a, b in zip(one, other, strict=True)
        )

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if isinstance(module, Operation):
            return
        super().check(module, inputs, outputs)
        if not hasattr(module, "eps") and not hasattr(module, "variance_epsilon"):
            raise ValueError(
                f"LayerNormRule fits modules with `weight`, `bias` and `eps`, which {type(module).__name__} has not"
            )
        if not is_of_torch(module):
            _require_same(module, inputs[0], outputs[0])


def _require_same(module: nn.Module, x: Tensor, z: Tensor) -> None:
    """A module that is written by hand computes what the rule takes it to: looked at in the first element."""
    x, z = x[:1].detach(), z[:1].detach()
    norm = Normalisation.of(type(module).__name__, module, x, (x,), {})
    rows = norm.rows(wide(x))
    rows = rows - rows.mean(-1, keepdim=True) if norm.centred else rows
    expected = norm.back(rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps), x)
    expected = expected if norm.weight is None else expected * norm.weight.detach()
    expected = expected if norm.bias is None else expected + norm.bias.detach()
    if not holds((expected - z).abs().amax() <= _FAR * z.abs().amax()):
        raise ValueError(
            f"LayerNormRule takes {type(module).__name__} to return `weight * y + bias`, y being normalised, and it "
            "returns something else, `(1 + weight) * y` say: leave it to its operations, which have rules of their own"
        )
