"""Constants: the share of relevance that a natively executed call gives to what is no input, told to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reporting import Report
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import Identity, on_tape, parts
from tdhook.tape.internals import attention_in_parts, parameters_of, saving_as_it_is
from tdhook.tape.undoing import lock

__all__ = ["with_constants"]

_LOCK = lock()


class Reported(Identity):
    """Identity at which a fixed part of what travels backwards is reported."""

    @staticmethod
    def forward(z: Tensor, part: Tensor, reason: str, report: Report) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.reason, ctx.report = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        (part,) = ctx.saved_tensors
        amount = parts(grad) * parts(part)
        ctx.report(ctx.reason, torch.where(parts(grad) == 0, 0.0, amount))
        return grad, None, None, None


def with_constants(
    call: Call, outputs: object, *, factors: Sequence[float] | float = 1.0, moves: bool = False
) -> Any:
    """Have what a natively executed call gives to constants reported: ``(z - J x) g`` of its outputs ``z``.

    Args:
        call: the call.
        outputs: what it returned.
        factors: by which the rule multiplies the gradient of each input on the tape.
        moves: whether what travels is relevance through mere movement, of which constants take what ``1 - J 1`` says.
    """
    report, module = call.setting.report, call.module
    if report is None or not _is_expected(call, factors, moves):
        return outputs
    leaves, spec = tree_flatten(outputs)
    at = [i for i, z in enumerate(leaves) if isinstance(z, Tensor) and on_tape(z)]
    linear = linear_part(call, report, at, factors, moves)
    if linear is None:
        return outputs
    weighted = parameters_of(module).get("bias") is not None  # not read: some are made by reading
    named = isinstance(module, Operation) and module.name.startswith(
        ("linear", "conv", "batch_norm", "addmm")
    )
    reason = "bias" if weighted or named else "constant"
    for i, part in zip(at, linear, strict=True):
        z = leaves[i]
        rest = _one(z) - part if moves else z.detach() - part
        # Masked logits are constants of minus infinity, and no share of anything.
        leaves[i] = Reported.apply(z, rest.nan_to_num(0.0, 0.0, 0.0), reason, report)
    return tree_unflatten(leaves, spec)


def _one(x: Tensor) -> complex:
    """One, in both parts of a complex number."""
    return 1 + 1j if x.is_complex() else 1


def _is_expected(call: Call, factors: Sequence[float] | float, moves: bool) -> bool:
    """Whether ``(z - J x) g`` is a share of constants, and not relevance that a wrong rule made or lost."""
    module = call.module
    if not isinstance(module, Operation):
        return not moves
    if moves:
        return module.moves
    return not (module.multiplies and len(call.tensors()) > 1 and factors == 1.0)


def linear_part(
    call: Call, report: Report, at: Sequence[int], factors: Sequence[float] | float, moves: bool
) -> list[Tensor] | None:
    """``J x`` of the outputs ``at``, or ``J 1``; ``None`` where the function has no derivative of the kind."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    live = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and on_tape(x)]
    primals = tuple(leaves[i].detach() for i in live)
    scales = [factors] * len(live) if isinstance(factors, int | float) else list(factors)
    tangents = tuple(
        torch.full_like(x, _one(x)) if moves else f * x for f, x in zip(scales, primals, strict=True)
    )
    # Masked logits, infinite or the least number there is, are no share of anything; casts make infinities of them.
    tangents = tuple(torch.where(t.abs() > torch.finfo(t.dtype).max / 2, 0.0, t) for t in tangents)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for i, x in zip(live, inputs, strict=True):
            given[i] = x
        in_args, in_kwargs = tree_unflatten(given, spec)
        again = Call(call.module, call.function, in_args, in_kwargs)
        made = tree_leaves(again.natively())
        return tuple(made[i] for i in at)

    for derive in (_twice_backward, _forward_mode):
        try:
            with _AttentionInParts(), report.again.as_before():
                return derive(function, primals, tangents)
        except (RuntimeError, NotImplementedError):
            continue
    return None


class _AttentionInParts(TorchFunctionMode):
    """Runs fused attention, which has no derivative of the kind, as the operations that it is made of."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return attention_in_parts(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def _forward_mode(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> list[Tensor]:
    with _LOCK:  # torch counts how deep it is in it for all threads together
        return list(torch.func.jvp(function, primals, tangents)[1])


def _twice_backward(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> list[Tensor]:
    with torch.enable_grad(), saving_as_it_is():
        leaves = [leaf(x.clone()) for x in primals]
        outputs = [z if z.requires_grad else leaves[0].sum() * 0 + z for z in function(*leaves)]
        seeds = [torch.zeros_like(z).requires_grad_() for z in outputs]
        pulled: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, leaves, seeds, create_graph=True, allow_unused=True
        )
        live = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        pushed: Sequence[Tensor | None] = [None] * len(seeds)
        if live:
            pushed = torch.autograd.grad([g for g, _ in live], seeds, [t for _, t in live], allow_unused=True)
    return [torch.zeros_like(z) if p is None else p for p, z in zip(pushed, outputs, strict=True)]
