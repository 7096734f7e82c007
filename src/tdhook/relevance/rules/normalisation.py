"""Normalisation with its statistics held constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.gradient import GradientRule
from tdhook.relevance.secants.norms import Normalisation, held

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
        (x, *others), (g, *_) = step.inputs, relevance
        module = None if isinstance(step.module, Operation) else step.module
        norm = Normalisation.of(type(step.module).__name__, module, x, *step.arguments)
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

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """With the mean of both inverse deviations, whose difference takes what is its own."""
        return super().against(module, flow) if self.applied else secant(module, flow, held, keeps=True)

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
