"""Calls: one call of a module under a rule, on the tape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from tdhook.relevance.propagation.forms import ClosedForm
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.params import ParamModifier
from tdhook.relevance.propagation.reporting import current
from tdhook.relevance.propagation.steps import Affine, Grads, LinearStep, Modify, ModuleStep, Step
from tdhook.relevance.propagation.weights import WeightCache
from tdhook.tape.functions import TapeFunction, alias, on_tape, transformed
from tdhook.tape.origins import is_nonnegative
from tdhook.tape.overwriting import natively

__all__ = ["Call", "Formula", "LayerCall", "ModuleCall", "Ruled"]


class Formula(Protocol):
    """What a call asks of the rule that it runs under."""

    needs_inputs: ClassVar[bool]
    needs_outputs: ClassVar[bool]
    needs_vjp: ClassVar[bool]
    needs_sign: ClassVar[bool]

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        """The relevance of each input, given that of each output."""

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise where the rule does not fit the module."""


class Call(ABC):
    """One call of a module under a rule: it outlives the forward pass, on the tape."""

    rule: Formula
    module: nn.Module
    n_rest: int

    @abstractmethod
    def execute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the module itself."""

    @abstractmethod
    def kept(self, tensors: Sequence[Tensor], outputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """What the backward pass reads."""

    @abstractmethod
    def step(self, saved: Sequence[Tensor]) -> Step:
        """The call as the rule sees it in the backward pass, given what was kept."""


class Ruled(TapeFunction):
    """A call, on the tape."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the module."""
        return call.execute(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the rule reads."""
        ctx.call = call = inputs[0]
        ctx.save_for_backward(*call.kept(inputs[1:], output))

    @staticmethod
    def backward(ctx: Any, *out_relevance: Tensor) -> Any:
        """Turn the relevance of the outputs into that of the inputs."""
        call: Call = ctx.call
        relevances = call.rule.propagate(call.step(ctx.saved_tensors), out_relevance)
        return None, *relevances, *(None,) * call.n_rest


class LayerCall(Call):
    """A linear layer or convolution, called with one tensor.

    Attributes:
        form: how the layer computes.
        merged: the batch norm that is merged into the layer, if any.
    """

    def __init__(
        self, rule: Formula, layer: nn.Module, original: Callable[..., Any], form: ClosedForm
    ) -> None:
        self.rule, self.module, self.form, self._original = rule, layer, form, original
        self.merged: nn.Module | None = None

    def run(self, x: Tensor) -> Any:
        """Run the layer, with the rule on the tape if its input is on it."""
        if not on_tape(x):
            z = self._original(x)
        else:
            rule, layer = self.rule, cast(Any, self.module)
            self._report, self._cache = current(), WeightCache.current()
            self._nonnegative = rule.needs_sign and is_nonnegative(x)
            if layer.bias is None:
                self.n_rest = 1
                (z,) = Ruled.apply(self, x, layer.weight)
            else:
                self.n_rest = 2
                (z,) = Ruled.apply(self, x, layer.weight, layer.bias)
        self.rule.check(self.module, (x,), (z,))
        return z

    def execute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z = self._original(tensors[0])
        self._dtype = z.dtype
        return (alias(z) if z._is_view() else z,)

    def kept(self, tensors: Sequence[Tensor], outputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return (*tensors, *outputs) if self.rule.needs_outputs else tensors

    def step(self, saved: Sequence[Tensor]) -> Step:
        merged = None if self.merged is None else Affine.of(self.merged)
        cache = self._cache
        if saved[1].dtype != self._dtype:
            # Under autocast the layer computed in another precision than it is kept in.
            saved, cache = [t.to(self._dtype) for t in saved], None
            merged = None if merged is None else merged.to(self._dtype)
        bias = saved[2] if self.n_rest == 2 else None
        outputs = tuple(saved[1 + self.n_rest :])
        step = LinearStep(self.module, self.form, saved[0], outputs, saved[1], bias, merged, cache)
        step.report, step.nonnegative = self._report, self._nonnegative
        return step


class ModuleCall(Call):
    """Any call of a module or an operation: which leaves of its arguments are tensors, and how to run it on them.

    A ``spec`` of ``None`` stands for a single tensor, which most calls take and return.
    """

    def __init__(
        self,
        rule: Formula,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.rule, self.module, self.original = rule, module, original
        self.spec: TreeSpec | None = None
        self.leaves: list[Any] = list(args)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            self.leaves, self.spec = tree_flatten((args, kwargs))
        self.at = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.names: dict[int, str] = {}
        if isinstance(module, Operation):
            names = module.parameter_names(args, kwargs)
            self.names = {i: names[i] for i in self.at if not on_tape(self.leaves[i])}
            self.at = [i for i in self.at if i not in self.names]
        self.n_rest = 0
        self.report = current()
        self.graph: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.out_spec: TreeSpec | None = None
        self.out_leaves: list[Any] = []

    def run(self) -> Any:
        """Run the module, with the rule on the tape if any input is on it."""
        rule = self.rule
        inputs = tuple(self.leaves[i] for i in self.at)
        if not any(map(on_tape, inputs)):
            result = self._invoke(inputs)
            rule.check(self.module, inputs, [z for z in tree_leaves(result) if isinstance(z, Tensor)])
            return result
        outputs = Ruled.apply(self, *inputs)
        rule.check(self.module, inputs, outputs)
        # The call outlives the forward pass; its arguments and its result need not.
        for i in self.at:
            self.leaves[i] = None
        leaves, self.out_leaves = self.out_leaves, []
        if self.out_spec is None:
            return outputs[0]
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if isinstance(z, Tensor) else z for z in leaves], self.out_spec)

    def execute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the module itself; where the rule differentiates it, on a tape of its own."""
        inputs = tuple(tensors)
        with natively(self.module):
            if not self.rule.needs_vjp:
                # What is returned as it came in would count as an input, not as an output that has a rule.
                return tuple(
                    alias(z) if z._is_view() or any(z is x for x in inputs) else z
                    for z in self._outputs(inputs)
                )
            if transformed():
                raise NotImplementedError(
                    f"{self.rule!r} differentiates {type(self.module).__name__}, which cannot be done inside "
                    "torch.vmap; linear layers and convolutions can be ruled there"
                )
            with torch.enable_grad():
                leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
                outputs = self._outputs(leaves)
        self.graph = (leaves, outputs)
        self.out_leaves = [z.detach() if isinstance(z, Tensor) else z for z in self.out_leaves]
        return tuple(z.detach() for z in outputs)

    def _outputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        result = self._invoke(inputs)
        if isinstance(result, Tensor):
            return (result,)
        self.out_leaves, self.out_spec = tree_flatten(result)
        return tuple(z for z in self.out_leaves if isinstance(z, Tensor))

    def _invoke(self, inputs: Sequence[Tensor], modify: Modify | None = None) -> Any:
        if self.spec is None:
            return self.original(inputs[0])
        leaves = list(self.leaves)
        for i, x in zip(self.at, inputs, strict=True):
            leaves[i] = x
        if modify is not None:
            for i, name in self.names.items():
                leaves[i] = modify(name, leaves[i]) if leaves[i].is_floating_point() else leaves[i]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.original(*args, **kwargs)

    def evaluate(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[Tensor, ...]:
        """The tensors that the module returns for other inputs and with modified parameters."""
        modifier = ParamModifier(lambda name, p: modify(name, p.detach()), ParamModifier.select_all)
        with natively(self.module), modifier(self.module):
            return tuple(z for z in tree_leaves(self._invoke(inputs, modify)) if isinstance(z, Tensor))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the module was called; ``None`` stands for tensors on the tape."""
        if self.spec is None:
            return tuple(self.leaves), {}
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def kept(self, tensors: Sequence[Tensor], outputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        rule = self.rule
        self.n_in = len(tensors) if rule.needs_inputs else 0
        return [*(tensors if rule.needs_inputs else ()), *(outputs if rule.needs_outputs else ())]

    def step(self, saved: Sequence[Tensor]) -> Step:
        inputs, outputs = tuple(saved[: self.n_in]), tuple(saved[self.n_in :])
        step = ModuleStep(self.module, self.evaluate, inputs, outputs, self.graph, self.arguments())
        step.report = self.report
        return step
