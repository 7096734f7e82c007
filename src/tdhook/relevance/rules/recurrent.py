"""Recurrent networks: all steps at once, or step by step, so that rules reach the operations of their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import Substituted
from tdhook.relevance.propagation.rule import RuleOf, RunningRule, converted
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.rules.cell_factors import Inside
from tdhook.relevance.rules.cells import State
from tdhook.relevance.rules.recurrences import inside_of
from tdhook.relevance.rules.recurrent_calls import CalledCell, CalledNetwork, called, kind_of
from tdhook.relevance.rules.simple import PassRule
from tdhook.relevance.secants.pair import Grads, Pair, Pull, pull_back
from tdhook.tape.conditions import holds
from tdhook.tape.functions import on_tape

__all__ = ["RecurrentRule"]


class RecurrentRule(RunningRule):
    """LSTM, GRU and simple recurrent networks, step by step: gates are held constant (Arras et al. 2017, 2019).

    Of each product of a gate and a signal the signal takes all relevance, and sums and products with weights have the
    rules of these operations (epsilon, unless a composite says otherwise), as have the activations (pass). The values
    are those of the fused kernel.
    """

    convention: ClassVar[Convention] = "gradient"
    opens: ClassVar[bool] = True
    opens_against: ClassVar[bool] = True
    in_both: ClassVar[bool] = True

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """By the fused kernel for the values, with its computation written on the tape.

        Nothing is converted: the operations inside are ruled in the convention of the flow.
        """
        return self._written(module, shares=False)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Likewise, where gates take their share of the difference."""
        return self._written(module, shares=True)

    def at_once(self, call: Call, flow: Convention, rule_of: RuleOf) -> Run | None:
        """All steps together, where the operations inside have rules that multiply by numbers.

        In the relevance flow a ReLU passes on to an activation of zero what no number makes of it.
        """
        kind, against = kind_of(type(call.module).__name__), call.setting.reference is not None
        if type(self) is not RecurrentRule or kind is None:
            return None
        if kind == "rnn_relu" and flow == "relevance" and not against:
            return None
        given = _called(call)
        if given.data.dtype not in _WITH_ROOM:
            return None
        live = [x for x in (given.data, *given.states) if on_tape(x)]
        if not live or any(map(on_tape, given.params)):
            return None
        inside = inside_of(kind, rule_of, live[0], given.params[0])
        if inside is None:
            return None
        if against:
            return None if given.dropped else secant(call.module, flow, _pulling(inside))
        if given.dropped and type(rule_of("dropout", live[0], given.dropped, True)) is not PassRule:
            return None
        run = partial(_valued, write=lambda given, values: given.at_once(inside, values))
        return converted(run, "gradient", flow)

    @staticmethod
    def _written(module: nn.Module, *, shares: bool) -> Run:
        if kind_of(type(module).__name__) is None:  # a module, whose operations are ruled one by one
            return Call.execute
        return partial(_valued, write=lambda given, _: given.written(shares))


_WITH_ROOM = frozenset((torch.float32, torch.float64, torch.bfloat16))


def _valued(call: Call, write: Callable[[CalledCell | CalledNetwork, State], State]) -> Any:
    """The values of a call, on the tape of what ``write`` makes of them."""
    given = _called(call)
    again = Again() if given.dropped else None
    with torch.no_grad():
        values = call.execute()
    single = isinstance(values, Tensor)
    made = (values,) if single else values
    with nullcontext() if again is None else again.as_before():  # the same numbers are drawn
        written = write(given, made)
    outputs = tuple(Substituted.apply(w, v) for w, v in zip(written, made, strict=True))
    return outputs[0] if single else outputs


def _called(call: Call) -> CalledCell | CalledNetwork:
    return called(type(call.module).__name__, call.function, call.args, call.kwargs)


def _pulling(inside: Inside) -> Pull:
    """What the arguments count per unit of difference, given what the values do."""

    def pull(pair: Pair, grads: Sequence[Tensor]) -> Grads:
        _require_the_same(pair)
        there = called(pair.name, pair.function, *pair.given(pair.starts, pair.beside))

        def run(*ends: Tensor) -> State:
            given: Any = called(pair.name, pair.function, *pair.given(ends))
            made: State = given.at_once(inside, pair.outputs, (there, pair.before))
            return made

        return pull_back(run, pair.ends, grads)

    return pull


def _require_the_same(pair: Pair) -> None:
    """Raise where something else differs on the reference than what comes in, and the first states.

    Those have a way through the cells even where they are constants, so that what they lead to is known.
    """
    given = called(pair.name, pair.function, *pair.arguments())
    follows = {id(x) for x in (given.data, *given.states)}
    others = [
        pair.leaves[i] == start for i, start in pair.beside.items() if id(pair.leaves[i]) not in follows
    ]
    if pair.other or not all(map(holds, others)):
        raise NotImplementedError(
            f"{pair.name} computes with other weights on the reference (baseline) than on the input, which all steps "
            "at once are not explained with; write ledger=True, with which it goes step by step, or hold constant what "
            "the weights are made of"
        )
