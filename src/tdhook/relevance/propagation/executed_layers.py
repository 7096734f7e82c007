"""Executed layers: what a call of a linear layer or convolution under a formula leaves on the tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.executed import Formula
from tdhook.relevance.propagation.forms import ClosedForm, closed_form
from tdhook.relevance.propagation.lent import Lent
from tdhook.relevance.propagation.merges import Place
from tdhook.relevance.propagation.steps import Affine, LinearStep, Step
from tdhook.tape.functions import Context, TapeFunction, alias, on_tape
from tdhook.tape.internals import is_view, transformed
from tdhook.tape.origins import is_nonnegative
from tdhook.tape.sharded import added_up, is_sharded

__all__ = ["Directly", "ExecutedLayer", "RuledLayer", "running_layer"]

Directly: TypeAlias = "Callable[..., Tensor | None]"
"""``(form, relevance, x, weight, bias, *outputs) -> relevance of x``: a formula on plain tensors of one precision.

It may say ``None``, and leave it to a step.
"""

_PLAIN = (Tensor, nn.Parameter)
_WITH_ROOM = frozenset((torch.float32, torch.float64, torch.bfloat16))


def running_layer(
    rule: Formula,
    layer: nn.Module,
    form: ClosedForm,
    otherwise: Run,
    directly: Directly | None = None,
    *,
    checks: bool = True,
) -> Run:
    """How a linear layer or convolution runs under a formula.

    Args:
        rule: the rule.
        layer: the layer.
        form: how it computes.
        otherwise: makes calls with anything else than one tensor.
        directly: what the formula comes to where nothing is reported, merged, lent, sharded or converted.
        checks: whether the rule checks its calls.
    """
    parameters: Any = layer

    def run(call: Call) -> Any:
        _, function, args, kwargs, setting = call
        if kwargs and not args and list(kwargs) == ["input"]:
            args = (kwargs["input"],)
        elif len(args) != 1 or kwargs:
            return otherwise(call)
        x = args[0]
        if not isinstance(x, Tensor):
            return otherwise(call)
        if x.requires_grad or on_tape(x):
            # Strides and the like may have been set anew since the rule was bound.
            now = form if form.settled else closed_form(layer) or form
            executed = ExecutedLayer(rule, now, call, rule.needs_sign and is_nonnegative(x))
            weight, bias = parameters.weight, parameters.bias
            if weight.is_meta:
                executed.lent = Lent(layer)
                weight = bias = None
            elif (
                directly is not None
                and setting.report is None
                and setting.merges is None
                and type(x) in _PLAIN
                and type(weight) in _PLAIN
                and x.dtype is weight.dtype
                and x.dtype in _WITH_ROOM
                and x.device == weight.device
                and not transformed()
                and not torch.compiler.is_compiling()
            ):
                executed.directly = directly
            z = RuledLayer.apply(executed, x, weight, bias)
        else:
            z = function(x)
        if checks:
            rule.check(layer, args, (z,))
        return z

    return run


class ExecutedLayer(Place):
    """A call of a linear layer or convolution with one tensor ``x``.

    Attributes:
        rule: the rule, and ``form``: how the layer computes.
        module: the layer, and ``function``: its forward without the rule.
        nonnegative: whether no entry of ``x`` can be negative, as far as that is known.
        dtype: the precision in which the layer computed.
        lent: the parameters that it computed with, where it is only lent them while it runs.
        directly: what the formula comes to, if it can be had without a step.
        keeps_output: whether the backward pass needs what the layer returned.
    """

    __slots__ = (
        *("_setting", "directly", "dtype", "form", "function", "keeps_output", "lent", "module"),
        *("nonnegative", "rule"),
    )

    def __init__(self, rule: Formula, form: ClosedForm, call: Call, nonnegative: bool) -> None:
        self.rule, self.form, self.nonnegative = rule, form, nonnegative
        self.module, self.function, _, _, self._setting = call
        self.dtype: torch.dtype | None = None
        self.lent: Lent | None = None
        self.directly: Directly | None = None
        self.keeps_output = rule.needs_outputs

    def step(self, x: Tensor, weight: Tensor, bias: Tensor | None, *outputs: Tensor) -> Step:
        """The call as the rule sees it in the backward pass."""
        return self._step(x, weight, bias, outputs)

    def _step(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        outputs: tuple[Tensor, ...],
        origin: Tensor | None = None,
    ) -> Step:
        setting = self._setting
        cache, merged = setting.weights, None
        if x.device != weight.device:  # hooks move what goes in to where the layer lies
            x = x.to(weight.device)
        norm = None if setting.merges is None else setting.merges.norm_of(self)
        if norm is not None:
            merged = Affine.of(norm)
        # What is relevance per unit of output is soon too large for float16.
        dtype = torch.float32 if self.dtype is torch.float16 else self.dtype
        if merged is not None and dtype is not None:  # batch norms may be kept in single precision
            dtype = torch.promote_types(dtype, merged.scale.dtype)
        if dtype is not None and (weight.dtype != dtype or dtype != self.dtype):
            # Under autocast the layer computed in another precision than it is kept in.
            cache = None
            origin = None if origin is None else origin.to(dtype)
            x, weight, outputs = x.to(dtype), weight.to(dtype), tuple(z.to(dtype) for z in outputs)
            bias = None if bias is None else bias.to(dtype)
            merged = None if merged is None else merged.to(dtype)
        step = LinearStep(self.module, self.form, x, outputs, weight, bias, merged, cache, origin)
        step.report, step.nonnegative = setting.report, self.nonnegative
        if step.report is not None and self.dtype is torch.float16:
            step.report = step.report.rounded_to(self.dtype)
        step.writable = not is_sharded(weight)
        return step


class _OfLayer(Context, Protocol):
    executed: ExecutedLayer


class RuledLayer(TapeFunction):
    """A linear layer or convolution under a formula, on the tape."""

    @staticmethod
    def forward(executed: ExecutedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer itself."""
        lent, function = executed.lent, executed.function
        z: Tensor = function(x) if lent is None else lent.taken_down(function, x)
        executed.dtype = z.dtype
        return alias(z) if is_view(z) else z

    @staticmethod
    def setup_context(
        ctx: _OfLayer, inputs: tuple[ExecutedLayer, Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        """Keep what the rule reads."""
        executed, x, weight, bias = inputs
        if executed.lent is not None:
            weight, bias = executed.lent.parameters
        ctx.executed = executed
        if executed.keeps_output:
            ctx.save_for_backward(x, weight, bias, output)
        else:
            ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: _OfLayer, *out_relevance: Tensor) -> object:
        """Turn the relevance of the output into that of the input."""
        executed = ctx.executed
        saved = ctx.saved_tensors
        directly = executed.directly
        if directly is not None and executed.dtype is saved[0].dtype and not torch.is_grad_enabled():
            found = directly(executed.form, *out_relevance, *saved)
            if found is not None:
                return None, found, None, None
        step = executed.step(*saved)
        (relevance,) = executed.rule.propagate(step, tuple(map(added_up, out_relevance)))
        if relevance is not None and relevance.device != saved[0].device:
            relevance = relevance.to(saved[0].device)
        return None, relevance, None, None
