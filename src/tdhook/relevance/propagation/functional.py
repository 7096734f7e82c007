"""Linear layers and convolutions that are called as functions, with weights that no input decides, as layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.executed import Formula
from tdhook.relevance.propagation.executed_layers import ExecutedLayer, RuledLayer
from tdhook.relevance.propagation.forms import DENSE, ClosedForm, ConvForm, Convolution
from tdhook.relevance.propagation.operation import Operation
from tdhook.tape.functions import on_tape
from tdhook.tape.origins import is_nonnegative

__all__ = ["AsLayer", "as_layer", "by_place", "is_layer", "running_function"]

_PLAIN = (Tensor, nn.Parameter)
_CONVOLUTION = ("bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
_FUNCTIONS = {
    "linear": ("bias",),
    **{f"conv{rank}d": _CONVOLUTION for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _TRANSPOSED for rank in (1, 2, 3)},
}


class AsLayer(NamedTuple):
    """A call of a function as that of a layer.

    Attributes:
        form: how it computes.
        call: the call with one tensor.
        weight: the weight, and ``bias``: likewise.
    """

    form: ClosedForm
    call: Call
    weight: Tensor
    bias: Tensor | None


def is_layer(module: nn.Module) -> bool:
    """Whether calls may be those :func:`as_layer`."""
    return isinstance(module, Operation) and module.name in _FUNCTIONS


def by_place(call: Call) -> Call:
    """The same call, its input and weight given by place."""
    if len(call.args) > 1 or "weight" not in call.kwargs or not (call.args or "input" in call.kwargs):
        return call
    kwargs = dict(call.kwargs)
    args = call.args or (kwargs.pop("input"),)
    return call.given((*args, kwargs.pop("weight")), kwargs)


def as_layer(call: Call) -> AsLayer | None:
    """A call :func:`by_place` as that of a layer, unless its weights depend on the inputs, or are of another form."""
    operation: Any = call.module
    args, kwargs = call.args, call.kwargs
    if len(args) < 2 or not all(type(x) in _PLAIN for x in args[:2]):
        return None
    x, weight, *others = args
    given = {**dict(zip(_FUNCTIONS[operation.name], others, strict=False)), **kwargs}
    bias = given.pop("bias", None)
    constant = type(bias) in _PLAIN and not on_tape(bias) if bias is not None else True
    if not constant or on_tape(weight) or not on_tape(x):
        return None
    form = _form(operation.name, weight.dim(), given)
    if form is None:
        return None
    function: Callable[..., Any] = call.function
    alone = Call(operation, lambda x: function(x, *args[1:], **kwargs), (x,), {}, call.setting)
    return AsLayer(form, alone, weight, bias)


def _form(name: str, dims: int, given: dict[str, Any]) -> ClosedForm | None:
    if name == "linear":
        return DENSE if dims == 2 else None
    rank = int(name[-2])
    stride, padding, dilation, more = (
        _each(given.get(key, default), rank) for key, default in _DEFAULTS.items()
    )
    if dims != rank + 2 or not (stride and padding and dilation and more):
        return None
    return _convolution(stride, padding, dilation, more, given.get("groups", 1), "transpose" in name)


def _each(value: object, rank: int) -> tuple[int, ...]:
    """A setting along each axis; none of padding that is told by name."""
    if isinstance(value, int):
        return (value,) * rank
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return numbers * rank if len(numbers) == 1 else numbers


@lru_cache
def _convolution(
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    transposed: bool,
) -> ConvForm:
    return ConvForm(
        Convolution((0,) * len(stride), stride, padding, dilation, output_padding, groups, transposed)
    )


def running_function(rule: Formula, otherwise: Run, *, checks: bool) -> Run:
    """How a function that :func:`is_layer` runs under a formula.

    Args:
        rule: the rule.
        otherwise: makes calls that are none of a layer.
        checks: whether the rule checks its calls.
    """

    def run(call: Call) -> Any:
        call = by_place(call)
        found = as_layer(call)
        if found is None:
            return otherwise(call)
        form, alone, weight, bias = found
        (x,) = alone.args
        executed = ExecutedLayer(rule, form, alone, rule.needs_sign and is_nonnegative(x))
        z = RuledLayer.apply(executed, x, weight, bias)
        if checks:
            rule.check(alone.module, (x,), (z,))
        return z

    return run
