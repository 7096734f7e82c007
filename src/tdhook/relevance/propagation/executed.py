"""Executed calls: what one call under a formula leaves on the tape for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.again import Again, remembers
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.lent import are_lent
from tdhook.relevance.propagation.operation import Operation, known_as, maker_in
from tdhook.relevance.propagation.params import ParamModifier
from tdhook.relevance.propagation.steps import Grads, Modify, ModuleStep, Step
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import Context, TapeFunction, alias, on_tape
from tdhook.tape.internals import is_view, transformed
from tdhook.tape.overwriting import Constants, natively
from tdhook.tape.own import OwnTape
from tdhook.tape.precision import PLAIN, as_computed, precision
from tdhook.tape.trees import Shape, tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "ExecutedModule",
    "Formula",
    "Ruled",
    "running_module",
]


_CLOSES_OVER = (
    "`{}` differentiates in its backward pass, and what it differentiates does not depend on the tensors that it was "
    "given here: it closes over others; give the module that calls it a rule, EpsilonRule say, so that it runs as one "
    "unit"
)


class Formula(Protocol):
    """What an executed call asks of the rule that it runs under."""

    needs_inputs: ClassVar[bool]
    needs_outputs: ClassVar[bool]
    needs_vjp: ClassVar[bool]
    needs_sign: ClassVar[bool]
    reruns: ClassVar[bool]

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        """The relevance of each input, given that of each output."""

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise where the rule does not fit the module."""


class _OfModule(Context, Protocol):
    executed: ExecutedModule
    made_by: str


def running_module(rule: Formula) -> Run:
    """How any module or operation runs under a formula, differentiated where the formula asks for that."""
    return lambda call: ExecutedModule(rule, call).run()


class ExecutedModule:
    """Any call of a module or an operation: which leaves of its arguments are tensors, and how to run it on them.

    A ``spec`` of ``None`` stands for a single tensor, which most calls take and return.

    Attributes:
        keeps: whether the backward pass needs what went in, and whether it needs what came out.
        on_tape: whether the module is run on a tape of its own.
    """

    def __init__(self, rule: Formula, call: Call) -> None:
        self.rule = rule
        self.keeps, self.on_tape = (rule.needs_inputs, rule.needs_outputs), rule.needs_vjp
        self.module, self._function, args, kwargs, setting = call
        self.made_by = maker_in(known_as(self.module), args, kwargs)
        self.report = setting.report
        self.spec: Shape | None = None
        self.leaves: list[Any] = list(args)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            self.leaves, self.spec = tree_flatten((args, kwargs))
        tensors = {i: leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}
        self.at = list(tensors)
        self.names: dict[int, str] = {}
        if isinstance(self.module, Operation):
            names = self.module.parameter_names(args, kwargs)
            self.names = {i: names[i] for i, x in tensors.items() if not on_tape(x)}
            self.at = [i for i in self.at if i not in self.names]
        of = self.module
        draws = "dropout" in of.name if isinstance(of, Operation) else remembers(of)
        self._again = Again.of(self.module, kwargs) if rule.reruns and draws else None
        self._precision = precision() if rule.reruns else PLAIN
        self._fixed = [i for i, x in tensors.items() if i not in self.at and not isinstance(x, nn.Parameter)]
        self._constants: Constants | None = None
        self.tape: OwnTape | None = None
        self.out_spec: Shape | None = None
        self.out_leaves: list[Any] = []

    def run(self) -> Any:
        """Run the module, with the rule on the tape if any input is on it."""
        rule = self.rule
        inputs = tuple(self.leaves[i] for i in self.at)
        if not any(map(on_tape, inputs)):
            result = self._invoke(inputs)
            rule.check(self.module, inputs, [z for z in tree_leaves(result) if isinstance(z, Tensor)])
            return result
        self._constants = Constants({i: self.leaves[i] for i in self._fixed}) if self._fixed else None
        outputs = Ruled.apply(self, *inputs)
        rule.check(self.module, inputs, outputs)
        if self._constants is not None:
            self._constants.hold(self.leaves)
        # The call outlives the forward pass; its arguments and its result need not.
        for i in self.at:
            self.leaves[i] = None
        leaves, self.out_leaves = self.out_leaves, []
        if self.out_spec is None:
            return outputs[0]
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if isinstance(z, Tensor) else z for z in leaves], self.out_spec)

    def execute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the module itself; where the rule differentiates it, on a tape of its own."""
        with natively(self.module):
            if not self.on_tape:
                # What is returned as it came in would count as an input, not as an output that has a rule.
                return tuple(
                    alias(z) if is_view(z) or any(z is x for x in inputs) else z
                    for z in self._outputs(inputs)
                )
            if transformed():
                raise NotImplementedError(
                    f"{self.rule!r} differentiates {type(self.module).__name__}, which cannot be done inside "
                    "torch.vmap; linear layers and convolutions can be ruled there"
                )
            with torch.enable_grad():
                leaves = tuple(leaf(x) if x.requires_grad else x for x in inputs)
                outputs = self._outputs(leaves)
        self.tape = OwnTape(leaves, outputs)
        self.out_leaves = [z.detach() if isinstance(z, Tensor) else z for z in self.out_leaves]
        return tuple(z.detach() for z in outputs)

    def _outputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        result = self._invoke(inputs)
        if isinstance(result, Tensor):
            return (result,)
        self.out_leaves, self.out_spec = tree_flatten(result)
        return tuple(z for z in self.out_leaves if isinstance(z, Tensor))

    def _invoke(self, inputs: Sequence[Tensor], modify: Modify | None = None) -> object:
        if self.spec is None:
            return self._function(inputs[0])
        leaves = list(self.leaves)
        for i, x in zip(self.at, inputs, strict=True):
            leaves[i] = x
        if modify is not None:
            for i, name in self.names.items():
                leaves[i] = modify(name, leaves[i]) if leaves[i].is_floating_point() else leaves[i]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self._function(*args, **kwargs)

    def evaluate(self, inputs: Sequence[Tensor], modify: Modify) -> tuple[Tensor, ...]:
        """The tensors that the module returns for other inputs and with modified parameters."""
        if are_lent(self.module):
            raise NotImplementedError(
                f"{self.rule!r} modifies parameters of {type(self.module).__name__}, which are offloaded and only lent "
                "to it while it runs: keep this module in memory, or give it a rule that leaves parameters alone"
            )
        self.require_constants()
        modifier = ParamModifier(lambda name, p: modify(name, p.detach()), ParamModifier.select_all)
        with self._as_before(), modifier(self.module):
            return tuple(z for z in tree_leaves(self._invoke(inputs, modify)) if isinstance(z, Tensor))

    def require_constants(self) -> None:
        """Raise where constants that are still needed were overwritten."""
        if self._constants is not None:
            self._constants.require(type(self.module).__name__)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Run the module once more, as it was run, but for what it would overwrite."""
        again = nullcontext() if self._again is None else self._again.as_before()
        with again, natively(self.module), as_computed(self._precision):
            yield

    def _arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        if self.spec is None:
            return tuple(self.leaves), {}
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def step(self, saved: Sequence[Tensor]) -> Step:
        """The call as the rule sees it in the backward pass, given the inputs and outputs that it needs."""
        n_in = len(self.at) if self.keeps[0] else 0
        inputs, outputs = tuple(saved[:n_in]), tuple(saved[n_in:])
        step = ModuleStep(self.module, self.evaluate, inputs, outputs, self.tape, self._arguments())
        step.report = self.report
        return step


class Ruled(TapeFunction):
    """Any call under a formula, on the tape."""

    @staticmethod
    def forward(executed: ExecutedModule, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the module."""
        return executed.execute(tensors)

    @staticmethod
    def setup_context(ctx: _OfModule, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the rule reads."""
        ctx.executed = executed = inputs[0]
        ctx.made_by = executed.made_by
        inputs_kept, outputs_kept = executed.keeps
        if executed.tape is not None:
            off = [z for z, end in zip(output, executed.tape.ends, strict=True) if end is None]
            ctx.mark_non_differentiable(*off)
        ctx.save_for_backward(*(inputs[1:] if inputs_kept else ()), *(output if outputs_kept else ()))

    @staticmethod
    def backward(ctx: _OfModule, *out_relevance: Tensor) -> object:
        """Turn the relevance of the outputs into that of the inputs."""
        executed = ctx.executed
        try:
            return None, *executed.rule.propagate(executed.step(ctx.saved_tensors), out_relevance)
        except RuntimeError as error:
            if "differentiated Tensor" not in str(error):
                raise
            raise RuntimeError(_CLOSES_OVER.format(type(executed.module).__name__)) from error
