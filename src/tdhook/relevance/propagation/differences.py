"""Calls under a formula that sees differences from a reference.

What a rule says of values it says of differences: contributions are ``w_ij (x_i - x0_i)``, denominators differences of
outputs, and there are no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import between, noted, there
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import Substituted
from tdhook.relevance.propagation.executed import ExecutedModule, Formula
from tdhook.relevance.propagation.executed_layers import ExecutedLayer, RuledLayer
from tdhook.relevance.propagation.forms import ClosedForm, closed_form
from tdhook.relevance.propagation.functional import AsLayer, as_layer, by_place
from tdhook.relevance.propagation.lent import Lent
from tdhook.relevance.propagation.operation import Operation, known_as
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.steps import Grads, Modify, ModuleStep, Step
from tdhook.relevance.propagation.unfollowed import missed, require_followed
from tdhook.relevance.secants.pair import Pair, Pull, difference
from tdhook.relevance.secants.table import secant_of
from tdhook.relevance.secants.winners import picked_of
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import on_tape
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "DifferencedLayer",
    "DifferencedModule",
    "Differences",
    "formula_of_function",
    "formula_of_layer",
    "formula_of_module",
    "of_one_tensor",
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
        self.place, self._pull, self._reference = place, pull, call.setting.reference
        self.at = [i for i in self.at if on_tape(self.leaves[i])]
        if self.spec is None:
            self.leaves, self.spec = tree_flatten((call.args, call.kwargs))
        self._indices = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self._fixed = [i for i in self._indices if i not in self.at]

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

    def _once_more(self, /, *args: object, **kwargs: object) -> Any:
        with self._as_before():
            return self._function(*args, **kwargs)

    def step(self, saved: Sequence[Tensor]) -> Step:
        self.require_constants()
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
            known_as(self.module),
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
        pull = self._followed if self.place.infinite else self._pull
        step = Differences(self.module, self.evaluate, pair, pull, self._arguments())
        step.report = self.report
        return step

    def _followed(self, pair: Pair, grads: Sequence[Tensor]) -> Grads:
        """The secant, where something was infinite on the reference: it is to lead to all of the difference."""
        found = self._pull(pair, grads)
        require_followed(self._reference, self.place, missed(pair, grads, found))
        return found


def formula_of_module(rule: Formula, module: nn.Module, own: Convention, flow: Convention) -> Run:
    """How any call runs under a rule's formula, of differences."""
    pull = secant_of(known_as(module), is_module=not isinstance(module, Operation))

    def first(call: Call, place: Place) -> Any:
        return DifferencedModule(rule, pull, call, place).run()

    return between(noted(first), own, flow)


class DifferencedLayer(ExecutedLayer):
    """A call of a linear layer, beside that on the reference."""

    __slots__ = ("place",)

    def __init__(self, rule: Formula, call: Call, place: Place, form: ClosedForm | None = None) -> None:
        form = form or closed_form(call.module)
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


class _DifferencedFunction(DifferencedLayer):
    """A call of a function as that of a layer; where its weights are others on the reference, as that of any function.

    Args:
        otherwise: the call as that of any function.
    """

    __slots__ = ("_otherwise",)

    def __init__(self, rule: Formula, found: AsLayer, place: Place, otherwise: DifferencedModule) -> None:
        super().__init__(rule, found.call, place, found.form)
        for i in otherwise.at:
            otherwise.leaves[i] = None
        self._otherwise = otherwise

    def step(self, x: Tensor, weight: Tensor, bias: Tensor | None, *outputs: Tensor) -> Step:
        if any(start is not None for start in self.place.starts[1:]):
            return self._otherwise.step((x, *outputs))
        return super().step(x, weight, bias, *outputs)


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


def formula_of_function(
    rule: Formula, operation: nn.Module, own: Convention, flow: Convention, otherwise: Run
) -> Run:
    """How a function that :func:`~tdhook.relevance.propagation.functional.is_layer` runs, likewise."""
    pull = secant_of(known_as(operation), is_module=False)

    def first(call: Call, place: Place) -> Any:
        found = as_layer(call)
        assert found is not None
        executed = _DifferencedFunction(rule, found, place, DifferencedModule(rule, pull, call, place))
        z = RuledLayer.apply(executed, *found.call.args, found.weight, found.bias)
        rule.check(operation, found.call.args, (z,))
        return z

    run = between(noted(first), own, flow)

    def one(call: Call) -> Any:
        call = by_place(call)
        return otherwise(call) if as_layer(call) is None else run(call)

    return one


def of_one_tensor(call: Call) -> Call | None:
    """A call with one tensor, given by place; ``None`` for any other."""
    args = call.args or tuple(call.kwargs.values())
    return call.given(args, {}) if len(args) == 1 and isinstance(args[0], Tensor) else None
