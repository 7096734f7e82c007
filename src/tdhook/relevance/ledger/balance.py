"""Closes the books of a ledger: what became of the relevance of each batch element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.passes.forward import Run
from tdhook.relevance.ledger.ledger import Entry, Ledger, Note
from tdhook.targets import Seeds

__all__ = ["balance"]

_AT_ONCE = 128


def balance(
    ledger: Ledger, run: Run, seeds: Seeds, sources: Mapping[NestedKey, Tensor], flow: Convention
) -> dict[NestedKey, Tensor]:
    """Account for the relevance of each batch element: two backward passes for each 128 of them.

    Args:
        ledger: what metered the forward pass; its entries get their amounts.
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
    columns: dict[str, list[Tensor]] = {"target": [], "inputs": [], "absorbed": []}
    for i in range(seeds.several or 1):
        grads = [grad if seeds.several is None else grad[i] for grad in seeds.grads]
        books = _Books(ledger, seeds.tensors, grads, leaves, flow, batch)
        books.close()
        columns["target"].append(books.target)
        columns["inputs"].append(books.inputs.of("arrived").expand(books.count))
        absorbed = torch.zeros(books.count, dtype=torch.float64)
        columns["absorbed"].append(sum((entry.absorbed.cpu() for entry in ledger.entries), absorbed))
    like = seeds.tensors[0]
    shaped = {name: torch.stack(column, -1).reshape(*batch, len(column)) for name, column in columns.items()}
    shaped["gap"] = shaped["target"] - shaped["inputs"] - shaped["absorbed"]
    return {
        ("ledger", name): (value if seeds.several else value.squeeze(-1)).to(like.device, like.dtype)
        for name, value in shaped.items()
    }


@dataclass
class _Books:
    """The accounts of one explanation.

    A backward pass with all batch elements tells amounts, not whose they are. A second one in which the relevance of
    each element is multiplied by a number of its own does: everything is linear in relevance, so each amount comes back
    multiplied by the number of the element that it belongs to. Where elements meet (batch normalisation in training),
    amounts come back multiplied by none of the numbers; then each element gets a backward pass of its own.
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
        self.target = torch.zeros(self.count, dtype=torch.float64)
        for z, grad in zip(self.tensors, self.grads, strict=True):
            self.target += relevance_of(z, grad, self.flow).double().reshape(self.count, -1).sum(1).cpu()

    def close(self) -> None:
        """Find the amounts of all entries."""
        for entry in self.ledger.entries:
            entry.amounts.clear()
        for start in range(0, self.count, _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, self.count))
            if len(part) > 1 and self._together(part):
                continue
            for element in part:
                for entry, column, amount in self._pass({element: 1.0}):
                    self._enter(entry, column, element, amount.double().sum().reshape(1))

    def _together(self, part: range) -> bool:
        """Account for several elements at once, if they can be told apart."""
        size = len(part)
        first = self._pass(dict.fromkeys(part, 1.0))
        second = self._pass({element: 1 + k / size for k, element in enumerate(part)})
        found, whole, astray = [], 0.0, 0.0
        for (entry, column, amount), (_, _, multiplied) in zip(first, second, strict=True):
            value = amount.flatten().double()
            number = torch.where(value == 0, 1.0, multiplied.flatten().double() / value)
            element = ((number - 1) * size).round().clamp(0, size - 1)
            off = (number - 1 - element / size).abs() > 0.2 / size
            whole += float(value.abs().sum())
            astray += float(value[off].abs().sum())
            sums = torch.zeros(size, dtype=torch.float64, device=value.device)
            found.append((entry, column, sums.index_add_(0, element.long(), value)))
        if astray > 1e-3 * whole:
            return False
        for entry, column, sums in found:
            self._enter(entry, column, part.start, sums)
        return True

    def _enter(self, entry: Entry, column: str, start: int, sums: Tensor) -> None:
        row = torch.zeros(self.count, dtype=torch.float64)
        row[start : start + len(sums)] = sums.cpu()
        entry.add(column, row)

    def _pass(self, factors: dict[int, float]) -> list[Note]:
        """One backward pass with the relevance of each element times a factor, of all others none."""
        weights = torch.zeros(self.count, dtype=torch.float64)
        weights[list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float64)
        grads = [self._weighted(grad, weights) for grad in self.grads]
        with self.ledger.noting() as notes:
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                self.tensors, self.leaves, grads, retain_graph=True, allow_unused=True
            )
        for x, grad in zip(self.leaves, pulled, strict=True):
            if grad is not None:
                notes.append((self.inputs, "arrived", relevance_of(x, grad, self.flow).detach()))
        return notes

    def _rows(self, value: Tensor) -> Tensor:
        return value.reshape(self.count, *value.shape[len(self.batch) :])

    def _weighted(self, grad: Tensor, weights: Tensor) -> Tensor:
        rows = self._rows(grad)
        weights = weights.to(grad.device, grad.dtype).reshape(-1, *(1,) * (rows.dim() - 1))
        return (rows * weights).reshape(grad.shape)
