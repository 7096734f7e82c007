"""Rules that do not look at values: all of it, none of it, equal parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import moving
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import with_masks
from tdhook.relevance.propagation.conversions import NotOneTensor, Ratio, Unchanged
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.operation import Operation, known_as, maker_in
from tdhook.relevance.propagation.rule import RemovableRuleHandle, RunningRule
from tdhook.relevance.propagation.sharing import handing, secant
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.secants.slopes import slopes
from tdhook.selectors.kinds import INDEXED, WINNER
from tdhook.tape.functions import on_tape
from tdhook.tape.internals import children_of
from tdhook.tape.trees import tree_leaves

__all__ = ["IgnoreRule", "PassRule", "StopRule", "UniformRule"]

# The ratio of value and argument is the derivative, also at zero as torch has it.
_HOMOGENEOUS = frozenset(("ReLU", "relu"))


class PassRule(PropagationRule):
    """All relevance through unchanged, ``R_x = R_z``: for activations (Bach et al. 2015).

    Raises:
        ValueError: on the forward pass, where inputs and outputs differ in number or shape.
    """

    needs_inputs = False
    reruns = False
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

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        return relevance

    def shortcut(self, module: nn.Module, flow: Convention) -> Run:
        """A function of one tensor: relevance is handed on; in the gradient convention, ``g_x = g_z * z / x``."""
        name, formula = known_as(module), self.by_formula(module, flow)
        children = children_of(module)
        if flow == "gradient" and name in _HOMOGENEOUS:
            return lambda call: call.natively() if _takes_one_on_tape(call) else formula(call)

        def run(call: Call) -> object:
            if not _takes_one_on_tape(call):
                return formula(call)
            _, own, args, kwargs, _ = call
            alone = len(args) == 1 and not (kwargs or children or module.__dict__.get("inplace"))

            def function(x: Tensor) -> Any:
                z = own(x) if alone else call.on(x).natively()
                if not isinstance(z, Tensor):
                    z = tree_leaves(z)
                    self.check(module, (x,), [leaf for leaf in z if isinstance(leaf, Tensor)])
                elif z.shape != x.shape:
                    self.check(module, (x,), (z,))
                return z

            maker = maker_in(name, args, kwargs)
            try:
                if flow == "relevance":
                    z = Unchanged.apply(args[0], function, maker)
                    return z if call.setting.report is None else with_masks(call, args[0], z)
                return Ratio.apply(args[0], function, maker, call.setting.report)
            except NotOneTensor:
                return formula(call)

        return run

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Unchanged; per unit of difference that is the slope of the secant."""
        if self.applied:
            return super().against(module, flow)
        return handing(self.running(module, flow)) if flow == "relevance" else secant(module, flow, slopes)

    abbreviates = propagate


def _takes_one_on_tape(call: Call) -> bool:
    """Whether the first argument is on the tape, and the only tensor."""
    _, _, args, kwargs, _ = call
    if not args or not isinstance(args[0], Tensor) or not (args[0].requires_grad or on_tape(args[0])):
        return False
    return not (len(args) > 1 and _has_tensor(args[1:])) and not (kwargs and _has_tensor(kwargs))


def _has_tensor(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class StopRule(PropagationRule):
    """No relevance goes through: ``R_x = 0``. What arrives is absorbed."""

    absorbs_all = True

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


class IgnoreRule(RunningRule):
    """Leave the module and its gradient alone: for data movement and winner-take-all (max pooling).

    In a context a layer is left to the rule of its operation, ``Op("sigmoid")`` say, and an operation to autograd.
    """

    native = True

    def register(self, module: nn.Module) -> RemovableRuleHandle:
        """Do nothing to ``module``."""
        return RemovableRuleHandle(self, module)

    def unregister(self, module: nn.Module) -> None:
        """Do nothing to ``module``."""

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """As it is."""
        return Call.execute

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """As it is where data are moved; what picks values may pick others on the reference."""
        # Each operation in a module has a rule of its own. Dropout that is off returns what it is given.
        if not isinstance(module, Operation) or "dropout" in module.name:
            return Call.execute
        if not module.moves or module.name in WINNER:
            return secant(module, flow)
        return moving if module.name in INDEXED else Call.execute
