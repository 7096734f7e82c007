"""Closes the books of a ledger: what became of the relevance of each batch element."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.passes.forward import Run
from tdhook.relevance.ledger.elements import Account, Probe, each_sign, probes
from tdhook.relevance.ledger.ledger import Entry, Ledger, Note
from tdhook.relevance.secants.pair import difference
from tdhook.tape.functions import parts
from tdhook.tape.masks import masking
from tdhook.tape.precision import PLAIN, as_computed
from tdhook.targets import Seeds

__all__ = ["Counterpart", "balance"]

Counterpart: TypeAlias = "Callable[[Tensor], Tensor]"

# Batches of so many elements that meet are accounted for by a backward pass for each of them.
_FEW = 32


def balance(
    ledger: Ledger,
    run: Run,
    seeds: Seeds,
    sources: Mapping[NestedKey, Tensor],
    flow: Convention,
    there: Counterpart | None = None,
) -> dict[NestedKey, Tensor]:
    """Account for the relevance of each batch element, by a few backward passes of the whole batch.

    Args:
        ledger: what metered the forward pass; its entries get their amounts, and it is told whether these are of each
            element.
        run: the forward pass.
        seeds: what was put in.
        sources: where relevance can arrive, besides at the inputs of the run.
        flow: the convention of the backward pass.
        there: what explained values, and values where relevance arrives, are on a reference, if their differences are
            accounted for.

    Returns:
        ``("ledger", "target")``, ``"inputs"``, ``"absorbed"`` and ``"gap"`` of shape ``[*batch]``, or
        ``[*batch, targets]`` where several are explained; the entries of the ledger then hold the amounts of the
        last of these.
    """
    batch = run.outputs.batch_size
    _require_elements(seeds, batch)
    ends = run.ends(sources)
    columns: dict[str, list[Tensor]] = {"target": [], "inputs": [], "absorbed": [], "gap": []}
    apart = True
    for i in range(seeds.several or 1):
        books = _Books(ledger, _one(seeds, i), ends, flow, batch, there)
        apart = books.close() and apart
        for name, amounts in books.columns().items():
            columns[name].append(amounts)
    ledger.per_element = apart
    like = seeds.tensors[0]
    shaped = {name: torch.stack(column, -1).reshape(*batch, len(column)) for name, column in columns.items()}
    return {
        ("ledger", name): (value if seeds.several else value.squeeze(-1)).to(like.device, like.dtype)
        for name, value in shaped.items()
    }


def _require_elements(seeds: Seeds, batch: torch.Size) -> None:
    """Raise where it begins at a layer whose values are of no element of the batch that could be told."""
    for z in seeds.tensors:
        if z.shape[: len(batch)] != batch and z.shape[0] % batch.numel():
            raise ValueError(
                f"no ledger can be kept of what passes units of a layer of the shape {list(z.shape)}, which does not "
                f"consist of parts of the {batch.numel()} elements of the batch: leave out the ledger"
            )


def _one(seeds: Seeds, i: int) -> Seeds:
    """One of several explanations."""
    if seeds.several is None:
        return seeds
    whole = None if seeds.whole is None else _one(seeds.whole, i)
    handed = [(place, grad[i]) for place, grad in seeds.handed]
    return Seeds(seeds.keys, seeds.tensors, [grad[i] for grad in seeds.grads], whole=whole, handed=handed)


@dataclass
class _Books:
    """The accounts of one explanation.

    Elements are told apart by probes (:mod:`tdhook.relevance.ledger.elements`). Where they meet, as in batch
    normalisation in training, each of a few gets a backward pass of its own. Of many, two sums over the batch are
    known, and the elements share in them (:meth:`_share`).

    Attributes:
        target: what was put in, ``[count]``, but for ``masked``: at values that mask, which is no input's.
        shared: the target, or what the elements have of it where they share.
        outside: what was explained, and did not pass the units that are put in.
        inputs: what arrived at the inputs, and at those that mask.
        accounts: of a pass of all elements, by entry and column, in the order in which they were told.
    """

    ledger: Ledger
    seeds: Seeds
    ends: list[Tensor]
    flow: Convention
    batch: torch.Size
    there: Counterpart | None = None
    inputs: Entry = field(default_factory=lambda: Entry("", "inputs", None))
    accounts: dict[tuple[int, str], list[Account]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count = self.batch.numel()
        self.target, self.masked = self._put_in(self.seeds)
        self.shared, self.outside = self.target, self._nothing()
        if self.seeds.whole is not None:
            self.outside = sum(self._put_in(self.seeds.whole)) - self.target - self.masked

    def close(self) -> bool:
        """Find the amounts of all entries, and whether they are of each element."""
        opened: list[tuple[Entry, str, Account]] = []

        def open_account(entry: Entry, column: str, amount: Tensor) -> None:
            opened.append((entry, column, Account(amount, self.count)))
            self.accounts.setdefault((id(entry), column), []).append(opened[-1][2])

        for entry in self.ledger.entries:
            entry.clear()
        self._pass(torch.ones_like(self.target), open_account)
        apart = self._are_apart([account for _, _, account in opened])
        if apart:
            for entry, column, account in opened:
                entry.add(column, account.sums.cpu(), account.rounding.cpu())
        elif self.count <= _FEW:
            for element in torch.eye(self.count, dtype=self.target.dtype, device="cpu"):
                self._alone(element)
        else:
            self._share(opened)
        if self.seeds.whole is not None:
            passed = self.target + self.masked
            for column, amount in (
                ("arrived", passed + self.outside),
                ("left", passed),
                ("condition", self.outside),
            ):
                self.ledger.condition(self.seeds.keys[-1]).add(column, amount)
        return apart or self.count <= _FEW

    def columns(self) -> dict[str, Tensor]:
        """What is written, each ``[count]``; of the target, inputs have what the elements do not share."""
        absorbed = sum((entry.absorbed for entry in self.ledger.entries), self._nothing())
        arrived, masked = self.inputs.of("arrived"), self.inputs.of("masked")
        return {
            "target": self.target + self.masked + self.outside,
            "inputs": arrived + masked + self.target - self.shared,
            "absorbed": absorbed + self.masked - masked,
            "gap": self.shared + self.outside - arrived - absorbed,
        }

    def _put_in(self, seeds: Seeds) -> tuple[Tensor, Tensor]:
        """What a backward pass starts with, ``[count]``, and that at values that mask."""
        found, at_masks = self._nothing(), self._nothing()
        for z, grad in zip(seeds.tensors, seeds.grads, strict=True):
            counted, masked = self._split(z, grad)
            found += Account(counted, self.count).sums.cpu()
            at_masks += Account(masked, self.count).sums.cpu()
        return found, at_masks

    def _are_apart(self, accounts: list[Account]) -> bool:
        """Whether probes find that all accounts consist of amounts of single elements, which these then know."""
        made = probes(self.count, {account.amount.dtype for account in accounts})
        return all(map(self._agree, made)) and all(account.settle() for account in accounts)

    def _agree(self, probe: Probe) -> bool:
        odd: list[Account | None] = []

        def look(account: Account | None, amount: Tensor) -> None:
            if account is None or not (odd or account.agrees(probe, amount)):
                odd.append(account)

        self._again(probe.weights, look)
        return not odd

    def _alone(self, element: Tensor) -> None:
        """Account for one element, of weight one, by a pass of its own."""

        def enter(entry: Entry, column: str, amount: Tensor) -> None:
            account = Account(amount, 1)
            entry.add(column, element * account.sums.cpu(), element * account.rounding.cpu())

        self._pass(element, enter)

    def _share(self, opened: list[tuple[Entry, str, Account]]) -> None:
        """Account for the batch as a whole.

        Two sums over the elements are known of each amount, the plain one and one in which each element has a sign.
        Elements get the smallest amounts that have these sums. So the amounts of the batch are exact, and its gap is
        zero only where that of each element is, even if those add up to nothing.
        """
        signs = each_sign(self.count)
        signed: dict[int, Tensor] = {}
        self._again(
            signs, lambda account, amount: signed.update({id(account): Account(amount, 1).sums.cpu()})
        )
        for entry, column, account in opened:
            plain = Account(account.amount, 1)
            amounts = _smallest(signs, plain.sums.cpu(), signed[id(account)])
            entry.add(column, amounts, plain.rounding.cpu() / self.count)
        self.shared = _smallest(signs, self.target.sum(), (signs * self.target).sum())

    def _again(self, weights: Tensor, look: Callable[[Account | None, Tensor], None]) -> None:
        """One more pass, in which each account meets its amount; ``None`` where there was none before."""
        ahead = {key: iter(accounts) for key, accounts in self.accounts.items()}

        def find(entry: Entry, column: str, amount: Tensor) -> None:
            look(next(ahead.get((id(entry), column), iter(())), None), amount)

        self._pass(weights, find)

    def _pass(self, weights: Tensor, take: Note) -> None:
        """One backward pass with what is put in for each element multiplied by its weight, ``[count]``."""
        starts = [*self.seeds.tensors, *(place for place, _ in self.seeds.handed)]
        put_in = [*self.seeds.grads, *(grad for _, grad in self.seeds.handed)]
        grads = [self._weighted(grad, weights) for grad in put_in]
        with self.ledger.telling(take), as_computed(PLAIN):
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                starts, self.ends, grads, retain_graph=True, allow_unused=True
            )
        for x, grad in zip(self.ends, pulled, strict=True):
            if grad is not None:
                counted, masked = self._split(x, grad)
                take(self.inputs, "arrived", counted)
                take(self.inputs, "masked", masked)

    def _split(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The relevance of values, and that of values that mask."""
        value = x if self.there is None else difference(x.detach(), self.there(x))
        relevance, masks = relevance_of(parts(value), parts(grad), self.flow).detach(), masking(parts(x))
        return torch.where(masks, 0.0, relevance), torch.where(masks, relevance, 0.0)

    def _weighted(self, grad: Tensor, weights: Tensor) -> Tensor:
        rows = grad.reshape(self.count, -1)
        return (rows * weights.to(grad.device, grad.dtype).unsqueeze(1)).reshape(grad.shape)

    def _nothing(self) -> Tensor:
        return torch.zeros(self.count, dtype=torch.float64, device="cpu")


def _smallest(signs: Tensor, plain: Tensor, signed: Tensor) -> Tensor:
    """The smallest amounts, ``[count]``, that have a plain sum and a signed one."""
    mean = plain / len(signs)
    across = signs - signs.mean()
    return mean + across * ((signed - signs.sum() * mean) / across.square().sum())
