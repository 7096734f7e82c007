"""The ledger: where relevance went, and whether any was made or lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.accounting import reporting, with_constants
from tdhook.attribution.lrp_helpers.conversions import alias, live
from tdhook.attribution.lrp_helpers.operation import Operation
from tdhook.attribution.lrp_helpers.rule import Convention, Rule
from tdhook.attribution.lrp_helpers.rules.simple import IgnoreRule
from tdhook.targets import Seeds

__all__ = ["REASONS", "Entry", "Ledger", "balance"]

REASONS = ("bias", "stabiliser", "stop", "constant")


@dataclass
class Entry:
    """What went in and out of the calls of one module or operation.

    Attributes:
        path: dotted path of the module, or of the one around the operation.
        name: the module's class, or the operation with ``()``.
        rule: the rule it ran under.
        arrived: relevance of its outputs, one value per batch element, and ``left``: of its inputs.
        absorbed: reason to what was kept on purpose.
        calls: how many calls are added up here.
    """

    path: str
    name: str
    rule: Rule
    arrived: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    absorbed: dict[str, list[float]] = field(default_factory=dict)

    calls: int = 0

    def add(self, other: Entry) -> None:
        """Add the accounts of another call."""
        self.calls += 1
        self.arrived, self.left = _added(self.arrived, other.arrived), _added(self.left, other.left)
        for reason, kept in other.absorbed.items():
            self.absorbed[reason] = _added(self.absorbed.get(reason, []), kept)

    def total(self, reason: str | None = None) -> list[float]:
        """What was kept for one reason, or for all of them."""
        kept = self.absorbed.values() if reason is None else [self.absorbed.get(reason, [])]
        return [sum(each) for each in zip(*(k for k in kept if k), strict=True)] or [0.0] * len(self.arrived)

    @property
    def gap(self) -> list[float]:
        """What was lost without a reason, or, where negative, made of nothing."""
        return [a - b - c for a, b, c in zip(self.arrived, self.left, self.total(), strict=True)]


class Ledger:
    """Keeps accounts of one forward pass and of the backward passes through it, one per batch element.

    Attributes:
        entries: one per call, in execution order.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._element: int | None = None

    def elements(self, count: int) -> Iterator[int]:
        """Take the backward passes that follow for those of one batch element after the other."""
        for entry in self.entries:
            entry.arrived, entry.left = [0.0] * count, [0.0] * count
            entry.absorbed = {}
        try:
            for self._element in range(count):
                yield self._element
        finally:
            self._element = None

    @property
    def absorbed(self) -> list[float]:
        """What all calls kept together, per batch element."""
        return [sum(each) for each in zip(*(entry.total() for entry in self.entries), strict=True)]

    def summary(self) -> list[Entry]:
        """One entry for each module and operation at each place, in execution order, its calls added up."""
        found: dict[tuple[str, str, str], Entry] = {}
        for entry in self.entries:
            key = (entry.path, entry.name, repr(entry.rule))
            if key not in found:
                found[key] = Entry(entry.path, entry.name, entry.rule)
            found[key].add(entry)
        return list(found.values())

    def call(
        self,
        path: str,
        module: nn.Module,
        selector: Any,
        rule: Rule,
        flow: Convention,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make one call, with its inputs and outputs metered."""
        name = f"{module.name}()" if isinstance(module, Operation) else type(module).__name__
        entry = Entry(path, name, rule)
        self.entries.append(entry)

        def absorb(reason: str, amount: Tensor) -> None:
            if self._element is not None:
                kept = entry.absorbed.setdefault(reason, [0.0] * len(entry.arrived))
                kept[self._element] += _sum(amount)

        def arrive(amount: Tensor) -> None:
            if self._element is not None:
                entry.arrived[self._element] += _sum(amount)

        def leave(amount: Tensor) -> None:
            if self._element is not None:
                entry.left[self._element] += _sum(amount)

        args, kwargs = live(lambda x: Metered.apply(x, leave, flow), (args, kwargs))
        with reporting(absorb):
            if isinstance(rule, IgnoreRule):
                outputs = original(*args, **kwargs)
                moves = flow == "relevance"
                outputs = with_constants(module, original, args, kwargs, outputs, moves=moves)
            else:
                outputs = rule.run_in(flow, module, original, args, kwargs)
        return live(lambda z: Metered.apply(z, arrive, flow), outputs)


class Metered(torch.autograd.Function):
    """Identity that tells how much relevance passes."""

    @staticmethod
    def forward(x: Tensor, tell: Callable[[Tensor], None], flow: Convention) -> Tensor:
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.tell, flow = inputs
        ctx.save_for_backward(*([x] if flow == "gradient" else []))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        amount = grad
        for x in ctx.saved_tensors:
            # Masked logits are infinite and have no relevance.
            amount = torch.where(grad == 0, 0.0, x * grad)
        ctx.tell(amount)
        return grad, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, tell: Any, flow: Convention
    ) -> tuple[Tensor, Any]:
        return Metered.apply(x, tell, flow), in_dims[0]


def _added(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)] if a else list(b)


def balance(
    ledger: Ledger, seeds: Seeds, leaves: Sequence[Tensor], flow: Convention, batch: torch.Size
) -> dict[str, Tensor]:
    """Close the books: one backward pass per batch element.

    Args:
        ledger: what metered the forward pass.
        seeds: what was put in.
        leaves: where relevance can arrive.
        flow: the convention of the backward pass.
        batch: the batch shape.

    Returns:
        ``target``, ``inputs``, ``absorbed`` and ``gap`` of shape ``[*batch]``, or ``[*batch, targets]`` where several
        are explained.
    """
    count = batch.numel()
    columns: dict[str, list[Tensor]] = {"target": [], "inputs": [], "absorbed": []}
    for i in range(seeds.several or 1):
        grads = [grad if seeds.several is None else grad[i] for grad in seeds.grads]
        target, arrived = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for element in ledger.elements(count):
            own = [_only(element, count, grad, batch) for grad in grads]
            target[element] = sum(_relevance(z, g, flow) for z, g in zip(seeds.tensors, own, strict=True))
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                seeds.tensors, leaves, own, retain_graph=True, allow_unused=True
            )
            parts = (_relevance(x, g, flow) for x, g in zip(leaves, pulled, strict=True) if g is not None)
            arrived[element] = sum(parts)
        columns["target"].append(target)
        columns["inputs"].append(arrived)
        columns["absorbed"].append(torch.tensor(ledger.absorbed or [0.0] * count, dtype=torch.float64))
    like = seeds.tensors[0]
    shaped = {name: torch.stack(column, -1).reshape(*batch, len(column)) for name, column in columns.items()}
    shaped["gap"] = shaped["target"] - shaped["inputs"] - shaped["absorbed"]
    return {
        name: (value if seeds.several else value.squeeze(-1)).to(like.device, like.dtype)
        for name, value in shaped.items()
    }


def _only(element: int, count: int, grad: Tensor, batch: torch.Size) -> Tensor:
    """The seed of one batch element alone."""
    rows = grad.reshape(count, *grad.shape[len(batch) :])
    own = torch.zeros_like(rows)
    own[element] = rows[element]
    return own.reshape(grad.shape)


def _relevance(x: Tensor, grad: Tensor, flow: Convention) -> float:
    """All relevance of a tensor."""
    amount = grad if flow == "relevance" else torch.where(grad == 0, 0.0, x * grad)
    return _sum(amount)


def _sum(amount: Tensor) -> float:
    while torch._C._functorch.is_batchedtensor(amount):
        amount = torch._C._functorch.get_unwrapped(amount)
    return float(amount.detach().double().sum())
