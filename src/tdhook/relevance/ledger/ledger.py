"""The ledger: where relevance went, and whether any was made or lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.keys import parts_of as parts_of_key
from tdhook.markup import html_table
from tdhook.relevance.ledger.metered import metered_arguments, metered_outputs, moved_beside
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.beside import moving, noted
from tdhook.relevance.propagation.binding import Bindable, Bound
from tdhook.relevance.propagation.call import Call, Setting
from tdhook.relevance.propagation.constants import with_constants
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.reporting import Report
from tdhook.tape.functions import Context, Identity, alias, live, parts, unwrapped
from tdhook.tape.internals import storage_of
from tdhook.tape.masks import masks_in
from tdhook.tape.sharded import Spread, gathered, spread_of
from tdhook.tape.trees import tree_leaves

__all__ = ["REASONS", "Entry", "Ledger", "Note"]

Note: TypeAlias = "Callable[[Entry, str, Tensor], None]"
"""Takes down the amount of a column of an entry."""
_USUAL = ("bias", "stabiliser", "stop", "constant")
REASONS = (*_USUAL, "condition", "reconstruction")
"""What relevance is kept for; a table has those beyond the usual ones where any was."""
CAPTION = "Where relevance went"


@dataclass
class Entry:
    """What went in and out of the calls of one module or operation. Amounts are of shape ``[batch]``.

    Attributes:
        path: dotted path of the module, or of the one around the operation.
        name: the module's class, or the operation with ``()``.
        rule: the rule it ran under; ``None`` for the inputs of the model.
        amounts: ``"arrived"`` is relevance of its outputs, ``"left"`` of its inputs; reason to what was kept.
        calls: how many calls are added up here.
        rounding: what the precision of the values that passed can lose or make, ``[batch]``.
        spread: over which processes its values are spread, of which each has a part.
    """

    path: str
    name: str
    rule: Bindable | None
    amounts: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 1
    rounding: Tensor | float = 0.0
    spread: Spread = ()

    def of(self, column: str) -> Tensor:
        """What arrived, left, or was kept for a reason."""
        return self.amounts.get(column, torch.zeros(1, dtype=torch.float64, device="cpu"))

    @property
    def absorbed(self) -> Tensor:
        """What was kept for all reasons together."""
        return torch.stack(torch.broadcast_tensors(*map(self.of, REASONS))).sum(0)

    @property
    def gap(self) -> Tensor:
        """What was lost without a reason, or, where negative, made of nothing."""
        return self.of("arrived") - self.of("left") - self.absorbed

    def opens(self, tolerance: float = 1e-4) -> bool:
        """Whether relevance was lost or made here, beyond a part ``tolerance`` of what passed, and beyond rounding."""
        passed = torch.maximum(self.of("arrived").abs(), self.of("left").abs())
        return not bool((self.gap.abs() <= tolerance * passed + self.rounding).all())

    def add(self, column: str, amount: Tensor, rounding: Tensor | float = 0.0) -> None:
        """Add to a column, and what its precision can lose or make."""
        self.amounts[column] = self.amounts[column] + amount if column in self.amounts else amount
        self.rounding = self.rounding + rounding

    def clear(self) -> None:
        """Forget what was added."""
        self.amounts.clear()
        self.rounding = 0.0


class Ledger:
    """Keeps accounts of one forward pass and of the backward passes through it.

    Attributes:
        entries: one per call, in execution order.
        per_element: whether the amounts of each batch element are its own. Where elements meet in a large batch, its
            sums are known, and the elements share in them.
        references: on the mean over how many references the entries are, where differences are explained.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.per_element = True
        self.references = 1
        self._take: Note | None = None
        self._within: Setting | None = None
        self._spreads: dict[object, Spread] = {}

    @contextmanager
    def telling(self, take: Note) -> Iterator[None]:
        """Hand on what the calls tell during a backward pass."""
        self._spreads.clear()  # nodes of the tape, which must not be held from there
        self._take = take
        try:
            yield
        finally:
            self._take = None

    def note(self, entry: Entry, column: str, amount: Tensor) -> None:
        """Hand on an amount, of whichever shape, if anyone wants to know."""
        if self._take is not None:
            self._take(entry, column, gathered(unwrapped(amount).detach(), entry.spread))

    def condition(self, key: NestedKey) -> Entry:
        """The entry of what was explained, and did not pass the units of a layer."""
        path = ".".join(parts_of_key(key)[1:]).strip("'")
        if not self.entries or self.entries[-1].path != path or self.entries[-1].name != "Through":
            self.entries.append(Entry(path, "Through", None))
        return self.entries[-1]

    def clear(self) -> None:
        """Forget the calls: the forward pass is made once more."""
        self.entries.clear()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Do not count calls that are made once more, of checkpointed parts of a model."""
        count = len(self.entries)
        try:
            yield
        finally:
            del self.entries[count:]

    def accounts(self) -> list[Entry]:
        """The entries with their amounts of this moment."""
        return [replace(entry, amounts=dict(entry.amounts)) for entry in self.entries]

    def close_on(self, accounts: Sequence[Sequence[Entry]]) -> None:
        """Have the entries hold the mean of several accounts of them."""
        self.references = len(accounts)
        for entry, *each in zip(self.entries, *accounts, strict=True):
            entry.clear()
            for one in each:
                for column, amount in one.amounts.items():
                    entry.add(column, amount / len(each))
                entry.rounding = entry.rounding + one.rounding / len(each)

    @property
    def caption(self) -> str:
        """What a table of it is called: whether it is a mean, and of the elements or of the batch as a whole."""
        mean = f", on the mean over {self.references} references" if self.references > 1 else ""
        whole = "" if self.per_element else " (of the batch as a whole, whose elements meet)"
        return f"{CAPTION}{mean}{whole}"

    def summary(self) -> list[Entry]:
        """One entry for each module and operation at each place, in execution order, its calls added up."""
        found: dict[tuple[str, str, str], Entry] = {}
        for entry in self.entries:
            key = (entry.path, entry.name, repr(entry.rule))
            if key not in found:
                found[key] = Entry(entry.path, entry.name, entry.rule, calls=0)
            found[key].calls += 1
            for column, amount in entry.amounts.items():
                found[key].add(column, amount)
            found[key].rounding = found[key].rounding + entry.rounding
        return list(found.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings of a table of it."""
        met = {column for entry in self.entries for column in entry.amounts}
        reasons = [reason for reason in REASONS if reason in _USUAL or reason in met]
        return ("module", "operation", "rule", "arrived", "left", *reasons, "gap")

    def cells(self) -> list[tuple[Any, ...]]:
        """Each entry of the summary in words, in the order of :attr:`columns`, and whether it opens a gap."""
        entries = self.summary()
        scale = max((float(entry.of("arrived").abs().sum()) for entry in entries), default=1.0)
        rows: list[tuple[Any, ...]] = []
        for entry in entries:
            kind = entry.name if entry.calls == 1 else f"{entry.name} x{entry.calls}"
            sums = [float(entry.of(column).sum()) for column in self.columns[3:-1]]
            amounts = (_number(amount, scale) for amount in (*sums, float(entry.gap.sum())))
            rows.append(
                (
                    entry.path or "(model)",
                    kind,
                    "" if entry.rule is None else repr(entry.rule),
                    *amounts,
                    entry.opens(),
                )
            )
        return rows

    def _repr_html_(self) -> str:
        rows = self.cells()
        marked = [i for i, row in enumerate(rows) if row[-1]]
        columns = self.columns
        numbers = len(columns) - 3
        return html_table(self.caption, columns, [row[:-1] for row in rows], numbers=numbers, marked=marked)

    def call(self, path: str, selector: object, bound: Bound, call: Call) -> Any:
        """Make one call, with its inputs and outputs metered, unless it is one of them in another shape."""
        rule, flow, run = bound
        module = call.module
        again = Again.of(module, call.kwargs)
        if rule.native and isinstance(module, Operation):
            with nullcontext() if module.moves else again.unnoticed():
                # On a reference, to the places that count there.
                outputs = run(call) if run is moving else call.execute()
            if _shares_memory(outputs, (call.args, call.kwargs)):
                return outputs
        if call.setting.reference is not None:
            return self._of_differences(path, bound, call, again)
        name = f"{module.name}()" if isinstance(module, Operation) else type(module).__name__
        entry = Entry(path, name, rule, spread=spread_of(call.tensors(), self._spreads))
        self.entries.append(entry)

        def absorb(reason: str, amount: Tensor) -> None:
            self.note(entry, reason, amount)

        def arrive(amount: Tensor) -> None:
            self.note(entry, "arrived", amount)

        def leave(amount: Tensor) -> None:
            self.note(entry, "left", amount)

        setting = replace(call.setting, report=Report(absorb, again))
        call = call.live(lambda x: Metered.apply(x, leave, flow))._replace(setting=setting)
        outer, self._within = self._within, setting
        try:
            outputs = run(call)
        finally:
            self._within = outer
        if rule.native:
            outputs = with_constants(call, outputs, moves=flow == "relevance")
        return live(lambda z: Metered.apply(z, arrive, flow), outputs)

    def _of_differences(self, path: str, bound: Bound, call: Call, again: Again) -> Any:
        """The same of a call that is seen beside the one on a reference."""
        rule, flow, run = bound
        module = call.module
        name = f"{module.name}()" if isinstance(module, Operation) else type(module).__name__

        def first(call: Call, place: Place) -> Any:
            entry = Entry(path, name, rule, spread=spread_of(call.tensors(), self._spreads))
            self.entries.append(entry)

            def note(column: str, amount: Tensor) -> None:
                self.note(entry, column, amount)

            setting = replace(call.setting, report=Report(note, again))
            call = metered_arguments(call._replace(setting=setting), place, note, flow)
            outer, self._within = self._within, setting
            try:
                outputs = run(call)
            finally:
                self._within = outer
            if rule.native and isinstance(module, Operation) and module.moves:
                if flow == "relevance":
                    outputs = with_constants(call, outputs, moves=True)
                else:
                    outputs = moved_beside(call, outputs, place, note)
            return metered_outputs(outputs, place, note, flow)

        return noted(first, run)(call)

    def inside(self, call: Call) -> Call:
        """A call inside another one, which reports what is kept there."""
        return call if self._within is None else call.within(self._within)


class _OfMetered(Context, Protocol):
    tell: Callable[[Tensor], None]


class Metered(Identity):
    """Identity that tells how much relevance passes."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, tell: Callable[[Tensor], None], flow: Convention) -> Tensor:
        return alias(x)

    @staticmethod
    def setup_context(
        ctx: _OfMetered, inputs: tuple[Tensor, Callable[[Tensor], None], Convention], output: Tensor
    ) -> None:
        x, ctx.tell, flow = inputs
        ctx.save_for_backward(x if flow == "gradient" else None, masks_in(parts(x)))

    @staticmethod
    def backward(ctx: _OfMetered, grad: Tensor) -> object:
        amount = parts(grad)
        x, masks = ctx.saved_tensors
        if x is not None:
            # What is not a number has no relevance where nobody reads it.
            amount = relevance_of(parts(x), amount, "gradient")
        if masks is not None:
            amount = torch.where(masks, 0.0, amount)
        ctx.tell(amount)
        return grad, None, None

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[object, ...], x: Tensor, tell: object, flow: Convention
    ) -> tuple[Tensor, object]:
        return Metered.apply(x, tell, flow), in_dims[0]


def _number(amount: float, scale: float) -> str:
    return "" if abs(amount) < 1e-9 * scale else f"{amount:.4g}"


def _shares_memory(outputs: object, inputs: object) -> bool:
    """Whether overwriting an output overwrites an input."""
    storages = {storage_of(x) for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    return any(storage_of(z) in storages for z in tree_leaves(outputs) if isinstance(z, Tensor))
