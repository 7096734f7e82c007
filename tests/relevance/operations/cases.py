"""Cases: what each operation of the table looks like in a model, in all the ways it can be written.

A case is a function of ``h``, the output of a layer, of shape ``[batch, 24]``. All forms of one case do the same thing,
so they must be explained alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EVEN",
    "ORDER",
    "WIDTH",
    "Case",
    "calling",
    "columns",
    "const",
    "even",
    "forms_of",
    "inputs",
    "matrices",
    "other",
    "pictures",
    "sequences",
    "shaped_for",
    "volumes",
]

WIDTH = 24
Function = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """One operation, on values of one kind.

    Attributes:
        name: the operation.
        kind: what is done with it, where there are several cases of it.
        forms: ways to write it; the first is the reference.
        domain: the values that it is called on, a key of :func:`inputs`.
        batch: batch size; 1 where the operation knows no batches.
        tolerance: of the ledger and of equality; looser where precision is given up on the way.
        shows: the name under which the ledger lists it, or ``None`` where it is made of others.
    """

    name: str
    kind: str
    forms: dict[str, Function]
    domain: str = "signed"
    batch: int = 3
    tolerance: float = 1e-9
    shows: str | None = field(default="")

    def __post_init__(self) -> None:
        self.shows = self.name if self.shows == "" else self.shows

    @property
    def id(self) -> str:
        return f"{self.name}-{self.kind}" if self.kind else self.name


def inputs(domain: str, batch: int) -> Tensor:
    """Values of one kind, no two of which are equal or near zero."""
    n = batch * WIDTH
    ranks = torch.randperm(n, generator=torch.Generator().manual_seed(3)).double()
    unit = (ranks + 0.5) / n  # evenly in (0, 1), in random order
    found = {
        "signed": 4 * unit - 2,
        "unit": 1.6 * unit - 0.8,
        "positive": 0.1 + 0.8 * unit,
        "large": 1.2 + 3 * unit,
        "grid": (ranks - n // 2 + 0.5) * 2,  # exact in half precision
    }
    return found[domain].reshape(batch, WIDTH)


def const(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> Tensor:
    """A fixed tensor, weights of an operation say."""
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 11))
    return low + (high - low) * values


def pictures(h: Tensor) -> Tensor:
    return h.view(-1, 2, 3, 4)


def volumes(h: Tensor) -> Tensor:
    return h.view(-1, 1, 2, 3, 4)


def sequences(h: Tensor) -> Tensor:
    return h.view(-1, 4, 6)


def matrices(h: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that can be multiplied."""
    return h[:, :12].reshape(-1, 3, 4), h[:, 12:].reshape(-1, 4, 3)


def forms_of(name: str, *args: Any, out: bool = True, **kwargs: Any) -> dict[str, Function]:
    """All ways in which torch can call a function of ``h``: function, method, in place, ``out=``."""
    return dict(_forms(name, args, kwargs, out))


def _forms(name: str, args: Any, kwargs: Any, out: bool) -> Iterator[tuple[str, Function]]:
    homes = {"torch": torch, "method": torch.Tensor, "F": F, "special": torch.special}
    for home, owner in homes.items():
        for written in (name, f"{name}_"):
            function = getattr(owner, written, None)
            if function is None:
                continue
            yield f"{home}.{written}", lambda h, f=function: f(h, *args, **kwargs)
            if home == "torch" and written == name and out and _takes_out(function, args, kwargs):
                yield "out", lambda h, f=function: f(h, *args, out=torch.empty_like(h), **kwargs)
            if home == "F" and "inplace" in _parameters(function):
                yield "inplace", lambda h, f=function: f(h, *args, **{**kwargs, "inplace": True})


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


def calling(
    home: Any, name: str, *rest: Any, first: Callable[[Tensor], Any] = lambda h: h, **kwargs: Any
) -> Function:
    """``home.name(first(h), *rest, **kwargs)``."""
    function = getattr(home, name)
    return lambda h: function(first(h), *rest, **kwargs)


def _takes_out(function: Any, args: Any, kwargs: Any) -> bool:
    x = torch.rand(2, dtype=torch.float64)
    args = [a[..., :2] if isinstance(a, Tensor) and a.dim() else a for a in args]
    try:
        function(x, *args, out=torch.empty_like(x), **kwargs)
    except (TypeError, RuntimeError):
        return False
    return True


EVEN = torch.arange(WIDTH) % 2 == 0
ORDER = torch.tensor([3, 3, 0, 23, 7])


def columns(h: Tensor) -> Tensor:
    """Some columns for each row."""
    return ORDER.expand(h.shape[0], -1)


def shaped_for(name: str, h: Tensor) -> Tensor:
    """In the shape that a function of that name takes: of volumes, pictures or sequences."""
    return volumes(h) if "3d" in name else pictures(h) if "2d" in name else sequences(h)


def even(h: Tensor) -> Tensor:
    return h[:, ::2][:, :5] * 2


def other(h: Tensor) -> Tensor:
    """A second argument of the same shape."""
    return h.roll(1, -1)
