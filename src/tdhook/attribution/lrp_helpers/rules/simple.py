"""Rules that do not look at values: all of it, none of it, equal parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdhook.attribution.lrp_helpers.conversions import Ratio, on_tape
from tdhook.attribution.lrp_helpers.propagation import PropagationRule
from tdhook.attribution.lrp_helpers.rule import Convention, RemovableRuleHandle, Rule
from tdhook.attribution.lrp_helpers.steps import Grads, Step

__all__ = ["IgnoreRule", "PassRule", "StopRule", "UniformRule"]


class PassRule(PropagationRule):
    """All relevance through unchanged, ``R_x = R_z``: for activations (Bach et al. 2015).

    Raises:
        ValueError: on the forward pass, where inputs and outputs differ in number or shape.
    """

    needs_inputs = False
    in_both = True

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(outputs):
            raise ValueError(
                "PassRule requires the number of inputs and outputs to be the same, "
                f"got {len(inputs)} inputs and {len(outputs)} outputs from {type(module).__name__}"
            )
        for index, (x, z) in enumerate(zip(inputs, outputs, strict=True)):
            if x.shape != z.shape:
                raise ValueError(
                    f"Input (shape={x.shape}) and output (shape={z.shape}) have different shapes at index {index} "
                    f"of {type(module).__name__}, which PassRule cannot pass on"
                )

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """In the gradient convention, ``g_x = g_z * z / x``: one multiplication for a function of one tensor."""
        single = (
            args and isinstance(args[0], Tensor) and not any(map(_has_tensor, (*args[1:], *kwargs.values())))
        )
        if flow == "relevance" or not single or not on_tape(args[0]) or getattr(module, "_modules", None):
            return super().run_in(flow, module, original, args, kwargs)

        def function(x: Tensor) -> Any:
            return original(x, *args[1:], **kwargs)

        function.__name__ = type(module).__name__
        return Ratio.apply(function, args[0])

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        return relevance


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class StopRule(PropagationRule):
    """No relevance goes through: ``R_x = 0``. What arrives is absorbed."""

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        if step.report is not None:
            for r in relevance:
                step.report("stop", r)
        return tuple(torch.zeros_like(x) if x.is_floating_point() else None for x in step.inputs)


class UniformRule(PropagationRule):
    """Equal parts to each of ``n`` inputs: ``R_x = R_z / n`` (AttnLRP, Achtibat et al. 2024, Prop. 3.3).

    Raises:
        ValueError: on the forward pass, where an input has another shape than the output.
    """

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for index, x in enumerate(inputs):
            if x.shape != outputs[0].shape:
                raise ValueError(
                    f"UniformRule gives each input an equal part of the output's relevance, but input {index} of "
                    f"{type(module).__name__} has shape {tuple(x.shape)} and its output {tuple(outputs[0].shape)}; "
                    "use UniformEpsilonRule there"
                )

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        n_inputs = len(step.inputs)
        return tuple(relevance[0] / n_inputs for _ in step.inputs)


class IgnoreRule(Rule):
    """Leave the module and its gradient alone: for data movement and winner-take-all (max pooling)."""

    def register(self, module: nn.Module) -> RemovableRuleHandle:
        """Do nothing to ``module``."""
        return RemovableRuleHandle(self, module)

    def unregister(self, module: nn.Module) -> None:
        """Do nothing to ``module``."""

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module as it is."""
        return original(*args, **kwargs)

    @staticmethod
    def forward(ctx: Any, apply_kwargs: Any, module: nn.Module, model_kwargs: Any, *inputs: Any) -> Any:
        """Run the module: never called, since the rule does not bind."""
        raise NotImplementedError("IgnoreRule does not bind to a module")

    @staticmethod
    def backward(ctx: Any, *out_relevance: Any) -> Any:
        """Never called, since the rule does not bind."""
        raise NotImplementedError("IgnoreRule does not bind to a module")
