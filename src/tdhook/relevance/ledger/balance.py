"""Closes the books of a ledger: what became of the relevance of each batch element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, masking, relevance_of
from tdhook.passes.forward import Run
from tdhook.relevance.ledger.elements import Account, each_sign, probes, wide
from tdhook.relevance.ledger.ledger import Entry, Ledger, Note
from tdhook.tape.functions import parts
from tdhook.targets import Seeds

__all__ = ["balance"]

# Batches of so many elements that meet are accounted for by a backward pass for each of them.
_FEW = 32


def balance(
    ledger: Ledger, run: Run, seeds: Seeds, sources: Mapping[NestedKey, Tensor], flow: Convention
) -> dict[NestedKey, Tensor]:
    """Account for the relevance of each batch element, by a few backward passes of the whole batch.

    Args:
        ledger: what metered the forward pass; its entries get their amounts, and it is told whether these are of each
            element.
        run: the forward pass.
        seeds: what was put in.
        sources: where relevance can arrive, besides at the inputs of the run.
        flow: the convention of the backward pass.

    Returns:
        ``("ledger", "target")``, ``"inputs"``, ``"absorbed"`` and ``"gap"`` of shape ``[*batch]``, or
        ``[*batch, targets]`` where several are explained; the entries of the ledger then hold the amounts of the
        last of these.
    """
    batch = run.outputs.batch_size
    found = {id(x): x for x in (*run.inputs.values(), *sources.values()) if x.is_leaf}
    leaves = list(found.values()) or list(sources.values())
    columns: dict[str, list[Tensor]] = {"target": [], "inputs": [], "absorbed": [], "gap": []}
    apart = True
    for i in range(seeds.several or 1):
        grads = [grad if seeds.several is None else grad[i] for grad in seeds.grads]
        books = _Books(ledger, seeds.tensors, grads, leaves, flow, batch)
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


@dataclass
class _Books:
    """The accounts of one explanation.

    Elements are told apart by probes (:mod:`tdhook.relevance.ledger.elements`). Where they meet, as in batch
    normalisation in training, each of a few gets a backward pass of its own. Of many, two weighted sums over the batch
    are known, and the elements share in them (:meth:`_whole`).
    """

    ledger: Ledger
    tensors: list[Tensor]
    grads: list[Tensor]
    leaves: list[Tensor]
    flow: Convention
    batch: torch.Size

    def __post_init__(self) -> None:
        self.count = self.batch.numel()
        self.inputs = Entry("", "inputs", None)
        self.target, self._masked = self._nothing(), self._nothing()
        for z, grad in zip(self.tensors, self.grads, strict=True):
            counted, masked = self._split(z, grad)
            for known, amount in ((self.target, counted), (self._masked, masked)):
                known += wide(amount).reshape(self.count, -1).sum(1).cpu()
        self._shared = self.target

    def close(self) -> bool:
        """Find the amounts of all entries, and whether they are of each element."""
        for entry in self.ledger.entries:
            entry.clear()
        first = self._pass(torch.ones_like(self.target))
        if self._apart(first):
            return True
        if self.count <= _FEW:
            for alone in torch.eye(self.count, dtype=self.target.dtype, device="cpu"):
                for entry, column, amount in self._pass(alone):
                    account = Account(amount, 1)
                    entry.add(column, alone * account.sums.cpu(), alone * account.rounding.cpu())
            return True
        self._whole(first)
        return False

    def columns(self) -> dict[str, Tensor]:
        """What is written, each ``[count]``; the inputs have what the elements do not share of their target."""
        absorbed = sum((entry.absorbed for entry in self.ledger.entries), self._nothing())
        arrived, masked = self.inputs.of("arrived"), self.inputs.of("masked")
        return {
            "target": self.target + self._masked,
            "inputs": arrived + masked + self.target - self._shared,
            "absorbed": absorbed + self._masked - masked,
            "gap": self._shared - arrived - absorbed,
        }

    def _apart(self, first: list[Note]) -> bool:
        """Account for all elements at once, if they can be told apart."""
        accounts = [Account(amount, self.count) for _, _, amount in first]
        dtypes = {amount.dtype for _, _, amount in first}
        for probe in probes(self.count, dtypes) if self.count > 1 else ():
            for account, (_, _, amount) in zip(accounts, self._pass(probe.weights), strict=True):
                if not account.agrees(probe, amount):
                    return False
        if not all(account.settle() for account in accounts):
            return False
        for account, (entry, column, _) in zip(accounts, first, strict=True):
            entry.add(column, account.sums.cpu(), account.rounding.cpu())
        return True

    def _whole(self, first: list[Note]) -> None:
        """Account for the batch as a whole.

        Two sums over the elements are known of each amount, the plain one and one in which each element has a sign.
        Elements get the smallest amounts that have these sums. So the amounts of the batch are exact, and its gap is
        zero only where that of each element is, even if those add up to nothing.
        """
        signs = each_sign(self.count)
        second = self._pass(signs)
        for (entry, column, amount), (_, _, signed) in zip(first, second, strict=True):
            plain, other = (Account(x, 1) for x in (amount, signed))
            rounding = plain.rounding.cpu() / self.count
            entry.add(column, _smallest(signs, plain.sums.cpu(), other.sums.cpu()), rounding)
        self._shared = _smallest(signs, self.target.sum(), (signs * self.target).sum())

    def _pass(self, weights: Tensor) -> list[Note]:
        """One backward pass with what is put in for each element multiplied by its weight, ``[count]``."""
        grads = [self._weighted(grad, weights) for grad in self.grads]
        with self.ledger.noting() as notes:
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                self.tensors, self.leaves, grads, retain_graph=True, allow_unused=True
            )
        for x, grad in zip(self.leaves, pulled, strict=True):
            if grad is not None:
                counted, masked = self._split(x, grad)
                notes += [(self.inputs, "arrived", counted), (self.inputs, "masked", masked)]
        # Devices run side by side, and tell in no order.
        places = {id(entry): i for i, entry in enumerate((self.inputs, *self.ledger.entries))}
        return sorted(notes, key=lambda note: (places[id(note[0])], note[1]))

    def _split(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The relevance of values, and that of values that mask, which is no input's (as metering has it)."""
        relevance, masks = relevance_of(parts(x), parts(grad), self.flow).detach(), masking(parts(x))
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
