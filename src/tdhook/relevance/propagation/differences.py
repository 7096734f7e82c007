"""Calls under a formula that sees differences from a reference.

What a rule says of values it says of differences: contributions are ``w_ij (x_i - x0_i)``, denominators differences of
outputs, and there are no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import between, noted, there
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import with_masks
from tdhook.relevance.propagation.conversions import NotOneTensor, Substituted, finite_product
from tdhook.relevance.propagation.executed import ExecutedLayer, ExecutedModule, Formula, RuledLayer
from tdhook.relevance.propagation.forms import closed_form
from tdhook.relevance.propagation.lent import Lent
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reference import Place
from tdhook.relevance.propagation.steps import Grads, Modify, ModuleStep, Step
from tdhook.relevance.secants.pair import Pair, Pull, difference
from tdhook.relevance.secants.slopes import slope, slopes
from tdhook.relevance.secants.table import LINEAR, secant_of
from tdhook.relevance.secants.winners import picked_of
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import TapeFunction, alias, on_tape
from tdhook.tape.internals import is_view
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "SECANT",
    "DifferencedLayer",
    "DifferencedModule",
    "Differences",
    "formula_of_layer",
    "formula_of_module",
    "handing",
    "of_one_tensor",
    "secant",
]


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
        self.pair, self._pull, self.differs = pair, pull, pair.differs
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


class DifferencedModule(ExecutedModule):
    """Any call, beside that on the reference.

    Args:
        rule: says what the inputs get.
        pull: the secant of what is called.
    """

    def __init__(self, rule: Formula, pull: Pull, call: Call, place: Place) -> None:
        super().__init__(rule, call)
        self.keeps, self.on_tape = (True, True), False
        self.place, self._pull = place, pull
        self.at = [i for i in self.at if on_tape(self.leaves[i])]
        if self.spec is None:
            self.leaves, self.spec = tree_flatten((call.args, call.kwargs))
        self._indices = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]

    def run(self) -> Any:
        inputs = [self.leaves[i].detach() for i in self.at]
        outputs = super().run()
        if self.out_spec is not None and any(
            isinstance(z, Tensor) and not z.is_floating_point() for z in tree_leaves(outputs)
        ):
            self.place.picked = partial(self._picked, inputs)
        return outputs

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
        with self._as_before():
            return self._function(*args, **kwargs)

    def step(self, saved: Sequence[Tensor]) -> Step:
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
            type(self.module).__name__,
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
        if step.report is not None and (self.keeps or step.differs):
            # What went to nothing that is attributed.
            amounts = [finite_product(d, g) for d, g in zip(step.outputs, relevance, strict=True)]
            amounts += [
                -finite_product(d, g) for d, g in zip(step.inputs, found, strict=True) if g is not None
            ]
            for amount in amounts:
                step.report("constant", amount)
        return found


SECANT: Formula = _Secant(False)
_SECANTS = SECANT, _Secant(True)


def secant(module: nn.Module, flow: Convention, pull: Pull | None = None, *, keeps: bool = False) -> Run:
    """How calls run whose difference is shared by the secant of what is called.

    Args:
        module: what is called.
        flow: the convention in which values arrive.
        pull: the secant, by default that of the module's name.
        keeps: whether it leaves a part out on purpose, which is reported as constant.
    """
    rule = _SECANTS[keeps]
    name, is_module = type(module).__name__, not isinstance(module, Operation)
    chosen = pull or secant_of(name, is_module=is_module)
    linear = pull is None and (name in LINEAR if not is_module else closed_form(module) is not None)
    if chosen is slopes:
        sloped = between(_sloped(name, module, rule, chosen), "gradient", flow)
        return sloped if flow == "gradient" else _passing(sloped)

    def first(call: Call, place: Place) -> Any:
        return DifferencedModule(rule, chosen, call, place).run()

    run = noted(first)
    return between(_natively_or(run) if linear else run, "gradient", flow)


def _sloped(name: str, module: nn.Module, rule: Formula, pull: Pull) -> Run:
    """How functions run that are applied to each value."""

    def first(call: Call, place: Place) -> Any:
        if len(call.args) and isinstance(call.args[0], Tensor) and len(place.given) == 1:
            try:
                at, by = _handed(call, name)
                return _Sloped.apply(call.args[0], at, by, call, place, name)
            except NotOneTensor:
                pass
        return DifferencedModule(rule, pull, call, place).run()

    return noted(first)


class _Sloped(TapeFunction):
    """A function that is applied to each value of one tensor, on the tape, maybe with the handle of that value."""

    @staticmethod
    def forward(
        x: Tensor, at: Tensor | None, by: Tensor | None, call: Call, place: Place, name: str
    ) -> Tensor:
        z = call.on(x).natively()
        if not isinstance(z, Tensor) or z.shape != x.shape or x.is_complex():
            raise NotOneTensor
        return alias(z) if z is x or is_view(z) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, at, _, ctx.call, ctx.where, ctx.made_by = inputs
        ctx.call, ctx.hands = ctx.call.on(None), at is not None
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        x, z = ctx.saved_tensors
        place: Place = ctx.where
        start, before = there(place.starts[0], x), place.before[0]
        found = slope(ctx.made_by, lambda at: ctx.call.on(at).natively(), x, start, z, before)
        back = grad * found
        return back, *((grad, back) if ctx.hands else (None, None)), None, None, None


def handing(passed: Run) -> Run:
    """How functions run that hand all relevance on, and what a unit counts to a layer that wants to know.

    Args:
        passed: how they run else.
    """

    def first(call: Call, place: Place) -> Any:
        args = call.args
        alone = len(place.given) == 1 and len(args) > 0 and isinstance(args[0], Tensor)
        at, by = _handed(call, place.name) if alone else (None, None)
        if at is None:
            return passed(call)
        z = _Handing.apply(args[0], at, by, call, place)
        return z if call.setting.report is None else with_masks(call, args[0], z)

    run = noted(first)

    def one(call: Call) -> Any:
        reference = call.setting.reference
        return passed(call) if reference is None or not reference.handles.used else run(call)

    return one


class _Handing(TapeFunction):
    """A function of one tensor, all relevance of whose value goes to its argument, with the handle of that."""

    @staticmethod
    def forward(x: Tensor, at: Tensor, by: Tensor, call: Call, place: Place) -> Tensor:
        z = call.on(x).natively()
        assert isinstance(z, Tensor)
        return alias(z) if z is x or is_view(z) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, call, ctx.where = inputs
        ctx.made_by = type(call.module).__name__
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> object:
        x, z = ctx.saved_tensors
        place: Place = ctx.where
        # Where nothing differs there is no relevance that could tell what counts.
        at, by = (
            torch.where(d == 0, 0.0, relevance / torch.where(d == 0, 1.0, d))
            for d in (difference(z, place.before[0]), difference(x, there(place.starts[0], x)))
        )
        return relevance, at, by, None, None


def _handed(call: Call, name: str) -> tuple[Tensor | None, Tensor | None]:
    """Where a function of one value hands over what arrives, if a layer before it wants to know; it is told."""
    reference = call.setting.reference
    handle = None if reference is None else reference.handles.of(call.args[0])
    if handle is None or name in _DRAWN:
        return None, None
    alone = call.on(None)
    return handle.tell(name, lambda at: alone.on(at).natively())


_DRAWN = frozenset(("rrelu", "RReLU"))


def _passing(otherwise: Run) -> Run:
    """How the same functions run in the relevance convention: what a value's difference got its argument's gets."""

    def first(call: Call, place: Place) -> Any:
        return _Passed.apply(call.args[0], call, place)

    run = noted(first)

    def one(call: Call) -> Any:
        leaves = tree_leaves((call.args, call.kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        alone = len(tensors) == 1 and len(call.args) > 0 and tensors[0] is call.args[0]
        return run(call) if alone and not tensors[0].is_complex() else otherwise(call)

    return one


class _Passed(TapeFunction):
    """A function that is applied to each value of one tensor, through which relevance passes as it is."""

    @staticmethod
    def forward(x: Tensor, call: Call, place: Place) -> Tensor:
        z: Tensor = call.on(x).natively()
        return alias(z) if z is x or is_view(z) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, call, ctx.where = inputs
        ctx.report, ctx.made_by = call.setting.report, type(call.module).__name__
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> object:
        (z,) = ctx.saved_tensors
        place: Place = ctx.where
        nothing = z == place.before[0]
        if ctx.report is not None:
            ctx.report("stabiliser", torch.where(nothing, relevance, 0.0))
        return torch.where(nothing, 0.0, relevance), None, None


def _natively_or(otherwise: Run) -> Run:
    """What is linear has its plain derivative, unless what it is computed with may differ on the reference."""

    def run(call: Call) -> Any:
        leaves = tree_leaves((call.args, call.kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not all(on_tape(x) or isinstance(x, nn.Parameter) for x in tensors):
            return otherwise(call)
        sums = type(call.module).__name__ in _SUMS
        plain = float not in map(type, leaves) if sums else sum(map(on_tape, tensors)) == 1
        return call.natively() if plain else otherwise(call)

    return run


_SUMS = frozenset(("add", "sub", "rsub"))


def formula_of_module(rule: Formula, module: nn.Module, own: Convention, flow: Convention) -> Run:
    """How any call runs under a rule's formula, of differences."""
    pull = secant_of(type(module).__name__, is_module=not isinstance(module, Operation))

    def first(call: Call, place: Place) -> Any:
        return DifferencedModule(rule, pull, call, place).run()

    return between(noted(first), own, flow)


class DifferencedLayer(ExecutedLayer):
    """A call of a linear layer, beside that on the reference."""

    __slots__ = ("place",)

    def __init__(self, rule: Formula, call: Call, place: Place) -> None:
        form = closed_form(call.module)
        assert form is not None
        super().__init__(rule, form, call, nonnegative=False)
        self.place, self.keeps_output = place, True

    def run(self, x: Tensor, function: type[RuledLayer] = RuledLayer) -> Any:
        """Run the layer, with the rule on the tape."""
        parameters: Any = self.module
        weight, bias = parameters.weight, parameters.bias
        if weight.is_meta:
            self.lent = Lent(self.module)
            weight = bias = None
        return function.apply(self, x, weight, bias)

    def step(self, x: Tensor, weight: Tensor, bias: Tensor | None, *outputs: Tensor) -> Step:
        start = there(self.place.starts[0], x)
        rises = tuple(map(difference, outputs, self.place.before))
        return self._step(x - start, weight, bias, rises, origin=start)


def formula_of_layer(
    rule: Formula, layer: nn.Module, own: Convention, flow: Convention, otherwise: Run
) -> Run:
    """How a linear layer or convolution runs under a rule's formula, of differences."""

    def first(call: Call, place: Place) -> Any:
        z = DifferencedLayer(rule, call, place).run(call.args[0])
        rule.check(layer, call.args, (z,))
        return z

    run = between(noted(first), own, flow)

    def one(call: Call) -> Any:
        alone = of_one_tensor(call)
        return otherwise(call) if alone is None else run(alone)

    return one


def of_one_tensor(call: Call) -> Call | None:
    """A call with one tensor, given by place; ``None`` for any other."""
    args = call.args or tuple(call.kwargs.values())
    return call.given(args, {}) if len(args) == 1 and isinstance(args[0], Tensor) else None
