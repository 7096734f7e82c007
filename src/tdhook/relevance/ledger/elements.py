"""Elements: which element of a batch an amount belongs to, told from backward passes of the whole batch.

A backward pass of all elements tells amounts, not whose they are. It is linear in what is put in. In a probe, what is
put in for each element is multiplied by a power of two with a sign: that changes exponents and signs alone, so that an
amount of one element comes back multiplied by the same factor, to the last bit. The factors of all probes together are
a number that no two elements share. Where what comes back is no such multiple, elements meet: others have a share in
the amount.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Account", "Probe", "each_sign", "probes"]

# How many powers of two a precision has room for, with room left for the amounts themselves.
_POWERS = {torch.float64: 256, torch.float32: 80, torch.bfloat16: 80}
_FEWEST = 8
# As much as stays in a CPU's caches.
_AT_ONCE = 2**17
# As many values tell mostly that elements meet.
_A_GLANCE = 1000


@dataclass(frozen=True)
class Probe:
    """What is put in for each element is multiplied by a factor of its own, as far as there are factors.

    Attributes:
        digits: one of the digits of the number of each element, ``[count]``: which factor it has.
        base: in which base these numbers are written.
        place: what the digit is worth in the number, a power of the base.
    """

    digits: Tensor
    base: int
    place: int

    @property
    def weights(self) -> Tensor:
        """The factor of each element, ``[count]``."""
        return self.factors[self.digits]

    @property
    def factors(self) -> Tensor:
        """The factor of each digit, ``[base]``: powers of two around one, each with both signs."""
        values = [(1 - 2 * (digit % 2)) * 2.0 ** (digit // 2 - self.middle) for digit in range(self.base)]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    @property
    def middle(self) -> int:
        """How often the smallest factor halves."""
        return self.base // 4

    def digits_of(self, ratio: Tensor) -> Tensor:
        """Which factors are nearest to some numbers."""
        powers = ratio.abs().log2().round().nan_to_num(0.0) + self.middle
        return (2 * powers + (ratio < 0)).clamp(0, self.base - 1).long()


def probes(count: int, dtypes: Iterable[torch.dtype]) -> list[Probe]:
    """As few probes as give each element a number of its own.

    Args:
        count: how many elements there are; a single one needs none.
        dtypes: precisions in which relevance travels.
    """
    most = 2 * min((_POWERS.get(dtype, _FEWEST) for dtype in dtypes), default=_FEWEST)
    needed = 0
    while most**needed < count:
        needed += 1
    base = 2
    while base**needed < count and needed:
        base += 1
    numbers = torch.arange(count, device="cpu")
    return [Probe(numbers // base**i % base, base, base**i) for i in range(needed)]


def each_sign(count: int) -> Tensor:
    """As many ones as minus ones, in no order that a model could know: ``[count]``."""
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(count), device="cpu")
    return torch.where(order % 2 == 0, 1.0, -1.0).double()


@dataclass
class Account:
    """One amount of a backward pass of all elements, and what probes say of it.

    Mostly the elements lie one behind the other in it; then sums of its rows are all that is looked at. Else each of
    its values is traced to the element that it is of.

    Attributes:
        amount: of any shape.
        count: how many elements there are.
        sums: what each element has of it, ``[count]``, once that is settled.
        sizes: sums of absolute values, likewise.
    """

    amount: Tensor
    count: int
    sums: Tensor = field(init=False)
    sizes: Tensor = field(init=False)
    _owners: Tensor | None = None
    _off: Tensor | None = None

    def __post_init__(self) -> None:
        self._in_rows = self.amount.numel() % self.count == 0
        if self._in_rows:
            self.sums, self.sizes = _sums(self.amount, self.count, sizes=True)

    @property
    def rounding(self) -> Tensor:
        """What the precision of the amount can lose or make of it, ``[count]``."""
        return torch.finfo(self.amount.dtype).eps * self.sizes

    def agrees(self, probe: Probe, amount: Tensor) -> bool:
        """Whether the amount that came back in a probe may consist of such of single elements."""
        if self._in_rows and not self._agrees_by_rows(probe, amount):
            self._in_rows = False
            if probe.place > 1:  # what earlier probes said of single values is gone
                return False
        return self._in_rows or self._agrees_by_values(probe, amount)

    def settle(self) -> bool:
        """Once all probes have been made: whether the amount consists of such of single elements."""
        if self._owners is None or self._off is None:
            return True
        values = _wide(self.amount.flatten())
        finite = values.isfinite()
        owners = torch.where(finite & (values != 0), self._owners, 0)
        if bool((owners >= self.count).any()):
            return False
        empty = torch.zeros(self.count, dtype=values.dtype, device=values.device)
        off, self.sizes, self.sums = (
            empty.index_add(0, owners, torch.where(finite, x, 0.0)) for x in (self._off, values.abs(), values)
        )
        if not bool(finite.all()):  # whose these are cannot be told
            self.sums = self.sums + values[~finite].sum()
        return bool((off <= self._tolerance * self.sizes).all())

    @property
    def _tolerance(self) -> float:
        """What rounding in another order may change, as a part of the amount."""
        dtype = self.amount.dtype
        return 4 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps

    def _underflow(self, probe: Probe) -> float:
        """What the smallest factor may take from a value."""
        return torch.finfo(self.amount.dtype).tiny * 2.0**probe.middle

    def _agrees_by_rows(self, probe: Probe, amount: Tensor) -> bool:
        (sums,) = _sums(amount, self.count)
        off = (sums / probe.weights.to(sums.device) - self.sums).abs()
        allowed = self._tolerance * self.sizes + amount.numel() // self.count * self._underflow(probe)
        return bool(((off <= allowed) | ~self.sums.isfinite()).all())

    def _agrees_by_values(self, probe: Probe, amount: Tensor) -> bool:
        values, found = self.amount.flatten(), amount.flatten()
        few = slice(None, None, len(values) // _A_GLANCE + 1)
        if self._traced(probe, values[few], found[few]) is None:
            return False
        traced = self._traced(probe, values, found)
        if traced is None:
            return False
        owners, off = traced
        self._owners = owners if self._owners is None else self._owners + owners
        self._off = off if self._off is None else torch.maximum(self._off, off)
        return True

    def _traced(self, probe: Probe, values: Tensor, found: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the probe says of whose the values are, and how far off each is; ``None`` if they are far off."""
        values, found = _wide(values), _wide(found)
        digits = probe.digits_of(torch.where(values == 0, 1.0, found / values))
        off = (found / probe.factors.to(values.device)[digits] - values).abs()
        off = (off - self._underflow(probe)).clamp(min=0)
        off = torch.where((values == 0) & (off > 0), torch.inf, off)
        finite = values.isfinite()
        near = off[finite].sum() <= self._tolerance * values[finite].abs().sum()
        return (digits * probe.place, off) if bool(near) else None


def _wide(x: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _sums(amount: Tensor, count: int, *, sizes: bool = False) -> Tensor:
    """Sums of the rows of an amount in double precision, ``[1, count]``, and of absolute values, ``[2, count]``."""
    width = amount.numel() // count
    rows = amount.reshape(count, width)
    high, wide = (max(_AT_ONCE // max(width, 1), 1), _AT_ONCE) if rows.is_cpu else (count, max(width, 1))
    found = []
    for some in rows.split(high):
        exact = map(_wide, some.split(wide, 1))
        parts = [torch.stack([x.sum(1), x.abs().sum(1)] if sizes else [x.sum(1)]) for x in exact]
        found.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
    return torch.cat(found, 1)
