"""Constants: the share of relevance that a natively executed call gives to what is no input, told to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tdhook.conventions import relevance_of
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reporting import Report
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import (
    Context,
    Identity,
    TapeFunction,
    is_identity,
    may_look_at,
    on_tape,
    parts,
    unwrapped,
    whole,
)
from tdhook.tape.internals import (
    attention_in_parts,
    load_forward_mode,
    maker_of,
    parameters_of,
    saving_as_it_is,
)
from tdhook.tape.masks import masking, unmasked
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten
from tdhook.tape.undoing import lock

__all__ = ["Reported", "with_constants", "with_masks"]

_LOCK = lock()


class _OfReported(Context, Protocol):
    reason: str
    report: Report


class _OfDifference(Context, Protocol):
    made: Tensor
    inputs: Sequence[Tensor]
    report: Report


class Reported(Identity):
    """Identity at which a fixed part, finite, of what travels backwards is reported."""

    @staticmethod
    def forward(z: Tensor, part: Tensor, reason: str, report: Report) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: _OfReported, inputs: tuple[Tensor, Tensor, str, Report], output: Tensor) -> None:
        _, part, ctx.reason, ctx.report = inputs
        ctx.save_for_backward(part)

    @staticmethod
    def backward(ctx: _OfReported, grad: Tensor) -> object:
        (part,) = ctx.saved_tensors
        ctx.report(ctx.reason, parts(grad) * parts(part))
        return grad, None, None, None


class Difference(Identity):
    """Identity at which is reported what a call keeps: what arrives at its output, less what goes to its inputs.

    It takes one more pull-back through the call, which needs no other derivative than its own.
    """

    @staticmethod
    def forward(z: Tensor, made: Tensor, inputs: Sequence[Tensor], report: Report) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(
        ctx: _OfDifference, inputs: tuple[Tensor, Tensor, Sequence[Tensor], Report], output: Tensor
    ) -> None:
        _, ctx.made, ctx.inputs, ctx.report = inputs

    @staticmethod
    def backward(ctx: _OfDifference, grad: Tensor) -> object:
        made, inputs = ctx.made, ctx.inputs
        pulled = torch.autograd.grad(made, inputs, grad, retain_graph=True, allow_unused=True)
        for x, g, sign in ((made, grad, 1), *((x, g, -1) for x, g in zip(inputs, pulled, strict=True))):
            if g is not None:
                ctx.report("constant", sign * relevance_of(parts(x), parts(g), "gradient"))
        return grad, None, None, None


def _runs_own_functions(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether there is a function with a backward pass of its own on the tape between inputs and outputs.

    Its derivatives of other kinds are missing or, of operators of ``torch.library``, zero.
    """
    seen = {get_gradient_edge(unwrapped(x)).node for x in inputs}
    ahead: list[Any] = [get_gradient_edge(unwrapped(z)).node for z in outputs]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        made = maker_of(node)
        if made is not None and not (issubclass(made, TapeFunction) or is_identity(node)):
            return True
        ahead += [before for before, _ in node.next_functions if before is not None]
    return False


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
    made = {i: z for i, z in enumerate(leaves) if isinstance(z, Tensor) and on_tape(z)}
    linear = None
    if moves or not _runs_own_functions([*made.values()], call.tensors()):
        linear = linear_part(call, report, [*made], factors, moves)
    if linear is None:
        if not moves:
            for i, z in made.items():
                leaves[i] = Difference.apply(z, z, call.tensors(), report)
        return tree_unflatten(leaves, spec)
    weighted = parameters_of(module).get("bias") is not None  # not read: some are made by reading
    named = isinstance(module, Operation) and module.name.startswith(
        ("linear", "conv", "batch_norm", "addmm")
    )
    kept = module.keeps if isinstance(module, Operation) else "constant"
    reason = "bias" if weighted or named else kept
    for (i, z), part in zip(made.items(), linear, strict=True):
        rest = (_counted(z, moves) - part).nan_to_num(0.0, 0.0, 0.0)
        if not may_look_at(rest) or bool(rest.any()):
            leaves[i] = Reported.apply(z, rest, reason, report)
    return tree_unflatten(leaves, spec)


def with_masks(call: Call, x: Tensor, z: Tensor) -> Tensor:
    """Have what is handed on to values that mask, or from such, reported: it is no share of anything.

    Args:
        call: the call.
        x: its argument.
        z: its value, of the same shape, whose relevance the argument gets.
    """
    report = call.setting.report
    if report is None:
        return z
    part = masking(x).to(z.dtype) - masking(z).to(z.dtype)
    if may_look_at(part) and not bool(part.any()):
        return z
    made: Tensor = Reported.apply(z, part, "constant", report)
    return made


def _counted(x: Tensor, moves: bool) -> Tensor:
    """Values, or ones in their place, where these are no share of anything in both parts of a complex number."""
    value = parts(x.detach())
    return whole(unmasked(torch.ones_like(value) if moves else value, value), x)


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
    live = {i: x.detach() for i, x in enumerate(leaves) if isinstance(x, Tensor) and on_tape(x)}
    primals = tuple(live.values())
    scales = [factors] * len(live) if isinstance(factors, int | float) else list(factors)
    # What is missing (NaN) is replaced by constants, if it is of any account.
    tangents = tuple(
        (f * _counted(x, moves)).nan_to_num(0.0, torch.inf, -torch.inf)
        for f, x in zip(scales, primals, strict=True)
    )

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for i, x in zip(live, inputs, strict=True):
            given[i] = x
        in_args, in_kwargs = tree_unflatten(given, spec)
        again = Call(call.module, call.function, in_args, in_kwargs)
        made = tree_leaves(again.natively())
        return tuple(z for i in at if isinstance(z := made[i], Tensor))

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
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        if isinstance(kwargs.get("attn_mask"), Tensor):
            kwargs = {**kwargs, "attn_mask": _added(kwargs["attn_mask"], query)}
        elif len(args) > 3 and isinstance(args[3], Tensor):
            args = (*args[:3], _added(args[3], query), *args[4:])
        return attention_in_parts(*args, **kwargs)[0]


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of attention as what is added to the scores.

    Rows that attend to nothing are left out, which return NaN: nobody reads them.
    """
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return torch.where(mask.isneginf().all(-1, keepdim=True), 0.0, mask)


def _forward_mode(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> list[Tensor]:
    with _LOCK:  # torch counts how deep it is in it for all threads together
        load_forward_mode()
        return list(torch.func.jvp(function, primals, tangents)[1])


def _twice_backward(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> list[Tensor]:
    with torch.enable_grad(), saving_as_it_is():
        leaves = [leaf(x.clone()) for x in primals]
        outputs = [z if z.requires_grad else leaves[0].sum() * 0 + z for z in function(*leaves)]
        # Not zeros: what is linear in them may be computed by way of their logarithm.
        seeds = [leaf(torch.ones_like(z)) for z in outputs]
        pulled: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, leaves, seeds, create_graph=True, allow_unused=True
        )
        live = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        pushed: Sequence[Tensor | None] = [None] * len(seeds)
        if live:
            pushed = torch.autograd.grad([g for g, _ in live], seeds, [t for _, t in live], allow_unused=True)
    return [torch.zeros_like(z) if p is None else p for p, z in zip(pushed, outputs, strict=True)]
