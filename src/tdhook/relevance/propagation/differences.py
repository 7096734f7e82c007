"""Calls under a formula that sees differences from a reference.

What a rule says of values it says of differences: contributions are ``w_ij (x_i - x0_i)``, denominators differences of
outputs, and there are no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import between, name_of_module, noted, there
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import NotOneTensor, Substituted, finite_product
from tdhook.relevance.propagation.executed import ExecutedLayer, ExecutedModule, Formula, RuledLayer
from tdhook.relevance.propagation.forms import ClosedForm, closed_form
from tdhook.relevance.propagation.lent import Lent
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reference import Place
from tdhook.relevance.propagation.steps import Grads, LinearStep, Modify, ModuleStep, Step
from tdhook.relevance.secants.pair import Pair, Pull, difference
from tdhook.relevance.secants.slopes import slope, slopes
from tdhook.relevance.secants.table import LINEAR, secant_of
from tdhook.relevance.secants.winners import picked_of
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import TapeFunction, alias, on_tape
from tdhook.tape.internals import is_view
from tdhook.tape.overwriting import natively
from tdhook.tape.sharded import added_up
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Differences", "formula_of_layer", "formula_of_module", "secant"]


class Differences(ModuleStep):
    """A step whose inputs and outputs are differences, and whose vector-Jacobian product is that of the secant.

    Attributes:
        pair: the call, and the one on the reference.
    """

    def __init__(
        self,
        module: nn.Module,
        evaluate: Callable[[Sequence[Tensor], Modify], Sequence[Tensor]],
        pair: Pair,
        pull: Pull,
        arguments: tuple[tuple[object, ...], dict[str, object]],
    ) -> None:
        super().__init__(module, evaluate, pair.steps, pair.rises, None, arguments)
        self.pair, self._pull = pair, pull
        self.origin = pair.starts[0] if pair.starts else None

    def vjp(self, *grads: Tensor) -> Grads:
        return self._pull(self.pair, grads)

    def modified(
        self, inputs: Sequence[Tensor], modify: Modify
    ) -> tuple[tuple[Tensor, ...], Callable[..., Grads]]:
        def without_bias(name: str, param: Tensor) -> Tensor:
            return torch.zeros_like(param) if name == "bias" else modify(name, param)

        return super().modified(inputs, without_bias)

    def constants(self, modify: Modify) -> tuple[Tensor | None, ...]:
        return (None,) * len(self.outputs)


class _DifferencedModule(ExecutedModule):
    """Any call, beside that on the reference.

    Args:
        rule: says what the inputs get.
        pull: the secant of what is called.
    """

    def __init__(self, rule: Formula, pull: Pull, call: Call, place: Place) -> None:
        super().__init__(rule, call)
        self.place, self._pull = place, pull
        self.at = [i for i in self.at if on_tape(self.leaves[i])]
        if self.spec is None:
            self.leaves, self.spec = tree_flatten((call.args, call.kwargs))
        self._indices = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]

    def run(self) -> Any:
        inputs = [self.leaves[i].detach() for i in self.at]
        outputs = _Differenced.apply(self, *(self.leaves[i] for i in self.at))
        self.rule.check(self.module, [self.place.given[self._indices.index(i)] for i in self.at], outputs)
        for i in self.at:
            self.leaves[i] = None
        leaves, self.out_leaves = self.out_leaves, []
        if any(not z.is_floating_point() for z in outputs) and self.out_spec is not None:
            self.place.picked = partial(self._picked, inputs)
        if self.out_spec is None:
            return outputs[0]
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if isinstance(z, Tensor) else z for z in leaves], self.out_spec)

    def execute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with natively(self.module):
            found = self._outputs(inputs)
        return tuple(alias(z) if is_view(z) or any(z is x for x in inputs) else z for z in found)

    def _picked(self, inputs: Sequence[Tensor], given: Sequence[Tensor], own: Any) -> Any:
        """What comes out of other inputs, given what came out by itself, where that is picked which was before."""
        leaves, starts = list(self.leaves), [given[self._indices.index(i)].detach() for i in self.at]
        ends = [leaf(x) for x in inputs]
        for i, x in zip(self.at, ends, strict=True):
            leaves[i] = x
        assert self.spec is not None
        args, kwargs = tree_unflatten(leaves, self.spec)
        with torch.enable_grad():
            outputs = [z for z in tree_leaves(self._once_more(*args, **kwargs)) if isinstance(z, Tensor)]
        values = picked_of(ends, outputs, starts)
        theirs, spec = tree_flatten(own)
        made = [
            Substituted.apply(x, value) if z.requires_grad else z
            for z, value, x in zip(outputs, values, theirs, strict=True)
        ]
        return tree_unflatten(made, spec)

    def _once_more(self, *args: object, **kwargs: object) -> Any:
        once_more = nullcontext() if self._again is None else self._again.as_before()
        with once_more, natively(self.module):
            return self._function(*args, **kwargs)

    def differences(self, saved: Sequence[Tensor]) -> Differences:
        """The call as the rule sees it in the backward pass."""
        count = len(self.at)
        inputs, outputs = tuple(saved[:count]), tuple(saved[count:])
        leaves = list(self.leaves)
        for i, x in zip(self.at, inputs, strict=True):
            leaves[i] = x
        # On the reference, one row may stand for all.
        starts = {
            i: start if start is None else start.expand_as(leaves[i])
            for i, start in zip(self._indices, self.place.starts, strict=True)
        }
        before = tuple(z0.expand_as(z) for z, z0 in zip(outputs, self.place.before, strict=True))
        assert self.spec is not None
        pair = Pair(
            name_of_module(self.module),
            None if isinstance(self.module, Operation) else self.module,
            self._once_more,
            leaves,
            self.spec,
            tuple(self.at),
            inputs,
            tuple(there(starts[i], x) for i, x in zip(self.at, inputs, strict=True)),
            outputs,
            before,
            {i: x for i, x in starts.items() if x is not None and i not in self.at},
            self.place.other,
            self.place.chosen,
        )
        step = Differences(self.module, self.evaluate, pair, self._pull, self._arguments())
        step.report = self.report
        return step


class _Differenced(TapeFunction):
    """Any call under a formula of differences, on the tape."""

    @staticmethod
    def forward(executed: _DifferencedModule, *inputs: Tensor) -> tuple[Tensor, ...]:
        return executed.execute(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.executed = executed = inputs[0]
        ctx.made_by = name_of_module(executed.module)
        ctx.mark_non_differentiable(*(z for z in output if not (z.is_floating_point() or z.is_complex())))
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *out_relevance: Tensor) -> object:
        executed: _DifferencedModule = ctx.executed
        step = executed.differences(ctx.saved_tensors)
        return None, *executed.rule.propagate(step, out_relevance)


class _Secant:
    """The formula of the secant itself, in the gradient convention.

    Args:
        keeps: whether it leaves something out.
    """

    needs_inputs: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = True
    needs_vjp: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    reruns: ClassVar[bool] = True

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """It fits everything."""

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        found = step.vjp(*relevance)
        if step.report is not None and (self.keeps or cast(Differences, step).pair.differs):
            # What went to nothing that is attributed.
            amounts = [finite_product(d, g) for d, g in zip(step.outputs, relevance, strict=True)]
            amounts += [
                -finite_product(d, g) for d, g in zip(step.inputs, found, strict=True) if g is not None
            ]
            for amount in amounts:
                step.report("constant", amount)
        return found


_SECANTS = _Secant(False), _Secant(True)


def secant(module: nn.Module, flow: Convention, pull: Pull | None = None, *, keeps: bool = False) -> Run:
    """How calls run whose difference is shared by the secant of what is called.

    Args:
        module: what is called.
        flow: the convention in which values arrive.
        pull: the secant, by default that of the module's name.
        keeps: whether it leaves a part out on purpose, which is reported as constant.
    """
    rule = _SECANTS[keeps]
    name, is_module = name_of_module(module), not isinstance(module, Operation)
    chosen = pull or secant_of(name, is_module=is_module)
    linear = pull is None and (name in LINEAR if not is_module else closed_form(module) is not None)
    if chosen is slopes:
        return between(_sloped(name, module, rule, chosen), "gradient", flow)

    def first(call: Call, place: Place) -> Any:
        return _DifferencedModule(rule, chosen, call, place).run()

    run = noted(first)
    return between(_natively_or(run) if linear else run, "gradient", flow)


def _sloped(name: str, module: nn.Module, rule: Formula, pull: Pull) -> Run:
    """How functions run that are applied to each value."""

    def first(call: Call, place: Place) -> Any:
        if len(call.args) and isinstance(call.args[0], Tensor) and len(place.given) == 1:
            try:
                return _Sloped.apply(call.args[0], call, place, name)
            except NotOneTensor:
                pass
        return _DifferencedModule(rule, pull, call, place).run()

    return noted(first)


class _Sloped(TapeFunction):
    """A function that is applied to each value of one tensor, on the tape."""

    @staticmethod
    def forward(x: Tensor, call: Call, place: Place, name: str) -> Tensor:
        z = call.on(x).natively()
        if not isinstance(z, Tensor) or z.shape != x.shape or x.is_complex():
            raise NotOneTensor
        return alias(z) if z is x or is_view(z) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.call, ctx.where, ctx.made_by = inputs
        ctx.call = ctx.call.on(None)
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        x, z = ctx.saved_tensors
        place: Place = ctx.where
        start, before = there(place.starts[0], x), place.before[0]
        found = slope(ctx.made_by, lambda at: ctx.call.on(at).natively(), x, start, z, before)
        return grad * found, None, None, None


def _natively_or(otherwise: Run) -> Run:
    """What is linear has its plain derivative, unless what it is computed with may differ on the reference."""

    def run(call: Call) -> Any:
        leaves = tree_leaves((call.args, call.kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not all(on_tape(x) or isinstance(x, nn.Parameter) for x in tensors):
            return otherwise(call)
        sums = name_of_module(call.module) in _SUMS
        plain = float not in map(type, leaves) if sums else sum(map(on_tape, tensors)) == 1
        return call.natively() if plain else otherwise(call)

    return run


_SUMS = frozenset(("add", "sub", "rsub"))


def formula_of_module(rule: Formula, module: nn.Module, own: Convention, flow: Convention) -> Run:
    """How any call runs under a rule's formula, of differences."""
    pull = secant_of(name_of_module(module), is_module=not isinstance(module, Operation))

    def first(call: Call, place: Place) -> Any:
        return _DifferencedModule(rule, pull, call, place).run()

    return between(noted(first), own, flow)


class _DifferencedLayer(ExecutedLayer):
    """A call of a linear layer, beside that on the reference."""

    __slots__ = ("place",)

    def __init__(self, rule: Formula, form: ClosedForm, call: Call, place: Place) -> None:
        super().__init__(rule, form, call, nonnegative=False)
        self.place = place

    def differences(self, x: Tensor, weight: Tensor, bias: Tensor | None, *outputs: Tensor) -> Step:
        """The call as the rule sees it in the backward pass."""
        start, before = there(self.place.starts[0], x), self.place.before
        rises = list(map(difference, outputs, before))
        step = self.step(x - start, weight, bias, *rises, origin=start)
        assert isinstance(step, LinearStep)
        return step


def formula_of_layer(
    rule: Formula, layer: nn.Module, own: Convention, flow: Convention, otherwise: Run
) -> Run:
    """How a linear layer or convolution runs under a rule's formula, of differences."""
    parameters: Any = layer

    def first(call: Call, place: Place) -> Any:
        form = closed_form(layer)
        args = call.args or tuple(call.kwargs.values())
        assert form is not None
        executed = _DifferencedLayer(rule, form, call, place)
        weight, bias = parameters.weight, parameters.bias
        if weight.is_meta:
            executed.lent = Lent(layer)
            weight = bias = None
        z = _LayerOfDifferences.apply(executed, args[0], weight, bias)
        rule.check(layer, args, (z,))
        return z

    run = between(noted(first), own, flow)

    def one(call: Call) -> Any:
        args = call.args or tuple(call.kwargs.values())
        fits = len(args) == 1 and isinstance(args[0], Tensor)
        return run(call) if fits else otherwise(call)

    return one


class _LayerOfDifferences(TapeFunction):
    """A linear layer or convolution under a formula of differences, on the tape."""

    @staticmethod
    def forward(executed: _DifferencedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return RuledLayer.forward(executed, x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        executed, x, weight, bias = inputs
        if executed.lent is not None:
            weight, bias = executed.lent.parameters
        ctx.executed = executed
        ctx.save_for_backward(x, weight, bias, output)

    @staticmethod
    def backward(ctx: Any, out_relevance: Tensor) -> object:
        executed: _DifferencedLayer = ctx.executed
        step = executed.differences(*ctx.saved_tensors)
        (relevance,) = executed.rule.propagate(step, (added_up(out_relevance),))
        return None, relevance, None, None
