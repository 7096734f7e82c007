"""Effects that are approximated beside those that are patched for real."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.attribution.patching import EDGE, Patching
from tdhook.evaluation.similarity import cosine, sign_agreement, spearman
from tdhook.extras import require
from tdhook.keys import parts_of, under
from tdhook.models.model import InKeys
from tdhook.targets.through import OfOperations, Place

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ApproximatedEffects", "EffectsAgreement", "compare_effects"]

Kinds = Mapping[str, Sequence[Place]]


@dataclass(frozen=True)
class EffectsAgreement:
    """How close the effects by one method come to those of patching, over all parts of some places and all inputs.

    Attributes:
        method: its name.
        kind: what the places are.
        parts: how many effects are compared: those of parts in which the runs differ.
        pearson: correlation of the effects.
        spearman: correlation of their ranks.
        sign: the share of them with the same sign.
        slope: what patching finds per unit of what the method finds, by least squares through zero.
    """

    method: str
    kind: str
    parts: int
    pearson: float
    spearman: float
    sign: float
    slope: float


@dataclass(frozen=True)
class ApproximatedEffects:
    """Effects of the same parts by several methods, and by patching.

    Attributes:
        rows: one for each method and kind of place.
        approximated: by method, what was written, ``[*batch, *parts]`` by entry.
        exact: the same by patching.
        seconds: that each method took, ``"exact"`` among them.
    """

    rows: tuple[EffectsAgreement, ...]
    approximated: Mapping[str, Mapping[NestedKey, Tensor]]
    exact: Mapping[NestedKey, Tensor]
    seconds: Mapping[str, float]

    def of(self, method: str, kind: str) -> EffectsAgreement:
        """The row of a method and a kind of place.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.method, row.kind) == (method, kind):
                return row
        known = ", ".join(f"({row.method!r}, {row.kind!r})" for row in self.rows)
        raise KeyError(f"no effects were compared of ({method!r}, {kind!r}); there are {known}")

    def table(self) -> Table:
        """A table for ``rich.print``.

        Raises:
            ImportError: rich is not installed.
        """
        table: Table = require("rich.table", "a table of effects").Table(
            "method", "places", "parts", "Pearson", "Spearman", "same sign", "slope"
        )
        for row in self.rows:
            figures = (row.pearson, row.spearman, row.sign, row.slope)
            table.add_row(row.method, row.kind, str(row.parts), *(f"{figure:.3f}" for figure in figures))
        return table


def compare_effects(
    methods: Mapping[str, Patching],
    module: nn.Module,
    td: TensorDictBase,
    *,
    kinds: Kinds | None = None,
    in_keys: InKeys | None = None,
    out_keys: Sequence[NestedKey] | None = None,
) -> ApproximatedEffects:
    """Compare approximated effects with those of patching, which take a forward pass for each part.

    Args:
        methods: by name. All patch the same parts of the same places, in the same direction, and explain the same.
        module: the model.
        td: clean and corrupt inputs, as :class:`~tdhook.attribution.Patching` reads them; left as it is.
        kinds: places by a name for them (attention, MLP, ...), whose effects are looked at together; an edge is its two
            places. By default each place is looked at by itself.
        in_keys: of a plain module, as ``prepare`` takes them.
        out_keys: likewise.

    Raises:
        ValueError: there is no method, or they patch different parts.
        KeyError: a kind names a place that is not patched.
    """
    if not methods:
        raise ValueError("no effects are compared: give methods by name")
    first = next(iter(methods.values()))
    for name, method in methods.items():
        if method.patches != first.patches:
            raise ValueError(
                f"{name!r} patches {method.patches}, and {next(iter(methods))!r} {first.patches}: compare methods that "
                "patch the same"
            )
    found: dict[str, dict[NestedKey, Tensor]] = {}
    seconds: dict[str, float] = {}
    for name, method in {**methods, "exact": first.exactly()}.items():
        explained = method.wrap(module, in_keys=in_keys, out_keys=out_keys)
        start = time.perf_counter()
        written = explained(td.copy())
        seconds[name] = time.perf_counter() - start
        found[name] = _effects(written, method)
    exact = found.pop("exact")
    kinds = kinds or {" -> ".join(parts_of(place)): [place] for place in exact}
    rows = [
        _agreement(name, kind, effects, exact, places)
        for name, effects in found.items()
        for kind, places in kinds.items()
    ]
    return ApproximatedEffects(tuple(rows), found, exact, seconds)


def _effects(td: TensorDictBase, method: Patching) -> dict[NestedKey, Tensor]:
    """Effects by place, or by the two places of an edge."""
    found: dict[NestedKey, Tensor] = {}
    for above in (method.attribution_key, EDGE):
        count = len(parts_of(above))
        for key, value in td.items(True, True):
            if parts_of(key)[:count] == parts_of(above) and len(parts_of(key)) > count:
                found[under(*parts_of(key)[count:])] = value.detach()
    return found


def _agreement(
    method: str,
    kind: str,
    effects: Mapping[NestedKey, Tensor],
    exact: Mapping[NestedKey, Tensor],
    places: Sequence[Place],
) -> EffectsAgreement:
    keys = [under(repr(place) if isinstance(place, OfOperations) else place) for place in places]
    for key in keys:
        if key not in exact:
            raise KeyError(
                f"{kind!r} names {key!r}, where nothing is patched; there are {', '.join(map(repr, exact))}"
            )
    a, b = (torch.cat([values[key].double().flatten() for key in keys]) for values in (effects, exact))
    differs = (a != 0) | (b != 0)  # a part that is the same in both runs has no effect by any method
    a, b = a[differs], b[differs]
    slope = (a * b).sum() / a.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    measured = (cosine(a - a.mean(), b - b.mean()), spearman(a, b), sign_agreement(a, b), slope)
    return EffectsAgreement(method, kind, len(a), *(float(figure) for figure in measured))
