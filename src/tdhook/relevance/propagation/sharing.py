"""Calls whose difference from a reference is shared by the secant of what is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention, per_value
from tdhook.relevance.propagation.beside import between, noted, there
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import with_masks
from tdhook.relevance.propagation.conversions import NotOneTensor, finite_product
from tdhook.relevance.propagation.differences import DifferencedModule
from tdhook.relevance.propagation.executed import Formula
from tdhook.relevance.propagation.forms import closed_form
from tdhook.relevance.propagation.operation import Operation, known_as
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.propagation.unfollowed import require_followed
from tdhook.relevance.secants.pair import Pull, difference
from tdhook.relevance.secants.slopes import slope, slopes
from tdhook.relevance.secants.table import LINEAR, secant_of
from tdhook.tape.functions import TapeFunction, alias, on_tape, parts
from tdhook.tape.internals import is_view, transformed
from tdhook.tape.trees import tree_leaves

__all__ = ["SECANT", "handing", "secant"]


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
            reason = step.module.keeps if isinstance(step.module, Operation) else "constant"
            for amount in amounts:
                step.report(reason, parts(amount))
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
    name, is_module = known_as(module), not isinstance(module, Operation)
    chosen = pull or secant_of(name, is_module=is_module)
    linear = pull is None and (name in LINEAR if not is_module else closed_form(module) is not None)
    if chosen is slopes:
        sloped = between(_sloped(name, module, rule, chosen), "gradient", flow)
        return sloped if flow == "gradient" else _passing(sloped)

    def first(call: Call, place: Place) -> Any:
        z = DifferencedModule(rule, chosen, call, place).run()
        if name in _SHIFTS:
            _hand_on(call, z, place)
        return z

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
        if place.infinite:
            known = difference(x, start).isfinite() & difference(z, before).isfinite()
            require_followed(ctx.call.setting.reference, place, ~known & (z != before) & (grad != 0))
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
        ctx.made_by = known_as(call.module)
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> object:
        x, z = ctx.saved_tensors
        place: Place = ctx.where
        # Where nothing differs there is no relevance that could tell what counts.
        at, by = (
            per_value(d, relevance)
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
        reference = call.setting.reference
        if reference is not None and reference.handles.used:
            return otherwise(call)  # a layer before it may want to know what counts
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
        ctx.report, ctx.made_by = call.setting.report, known_as(call.module)
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
        if not plain:
            return otherwise(call)
        z = call.natively()
        if sums:
            _hand_on(call, z)
        return z

    return run


_SUMS = frozenset(("add", "sub", "rsub"))


def _hand_on(call: Call, z: object, place: Place | None = None) -> None:
    """Let the layer before the addition of a constant know of the function behind that: the constant is a bias."""
    reference, shift = call.setting.reference, _SHIFTS.get(known_as(call.module))
    if reference is None or reference.running or not reference.handles.used or len(call.args) != 2:
        return
    (x, constant), kwargs = call.args, call.kwargs
    if shift is torch.add and not kwargs and not (isinstance(x, Tensor) and on_tape(x)):
        x, constant = constant, x
    if shift is None or not (isinstance(x, Tensor) and isinstance(z, Tensor) and x.shape == z.shape):
        return
    if (
        transformed()
        or not kwargs.keys() <= {"alpha"}
        or (isinstance(constant, Tensor) and on_tape(constant))
    ):
        return
    handle = reference.handles.of(x)
    if handle is not None:
        fixed = constant.detach().clone() if isinstance(constant, Tensor) else constant
        reference.handles.put(z, handle.behind_of(lambda v: shift(v, fixed, **kwargs), added=place))


_SHIFTS: dict[str, Callable[..., Tensor]] = {"add": torch.add, "sub": torch.sub}
