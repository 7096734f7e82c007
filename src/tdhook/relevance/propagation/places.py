"""Places: what a call met in the run that is explained, and in the one on the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tdhook.relevance.propagation.alike import SMALL, fits, is_alike
from tdhook.tape.conditions import is_traced
from tdhook.tape.functions import may_look_at, unwrapped
from tdhook.tape.masks import masking, masks_in
from tdhook.tape.overwriting import version_in
from tdhook.tape.sparse import equal

__all__ = ["Place", "masks_others"]


@dataclass
class Place:
    """One call of the first run, and what it met in the second.

    Attributes:
        name: what was called, ``path``: where, and ``module``: which one, if it is a module.
        given: the tensors that went in in the first run, ``live``: which of them are attributed.
        numbers: plain numbers among the arguments, and ``others``: whole ones, truth values and texts.
        made: the shapes of what came out.
        starts: the tensors that went in in the second run; ``None`` for what is the same in both.
        before: those that came out.
        other: whether plain numbers were others in the second run.
        within: tensors that the call met besides its arguments.
        made_anew: of what is kept, which of ``given`` are constants that each run makes of others, as a weight that is
            scaled: they were equal in both.
        picked: what comes out for other inputs where the first run decides what is picked, if it picks, and
            ``chosen``: whether it did.
        infinite: whether it met values in the second run that are not finite.
        versions: how often the constants among ``given`` had been overwritten, and zero for what is attributed.
    """

    name: str
    path: str
    given: list[Tensor]
    live: list[bool]
    numbers: list[float]
    made: list[torch.Size] = field(default_factory=list)
    starts: list[Tensor | None] = field(default_factory=list)
    before: tuple[Tensor, ...] = ()
    other: bool = False
    picked: Callable[[Sequence[Tensor], Any], Any] | None = None
    chosen: bool = False
    module: object = None
    others: list[object] = field(default_factory=list)
    within: list[Tensor] = field(default_factory=list)
    made_anew: list[bool] = field(default_factory=list)
    infinite: bool = False
    versions: list[int] = field(default_factory=list)

    def is_same_beside(self) -> Tensor | bool:
        """Whether what is not attributed was the same in both runs; a tensor where a graph is traced."""
        each = zip(self.given, self.live, self.starts, strict=True)
        beside = [(x, start) for x, live, start in each if not live and start is not None]
        if self.other or any(x.shape != start.shape for x, start in beside):
            return False
        if not beside:
            return True
        same = torch.stack([(x == start).all() for x, start in beside]).all()
        return same if is_traced() else bool(same)

    @property
    def constants(self) -> list[Tensor]:
        """The large ones among the constants that went in, or were met within."""
        fixed = (x for x, live in zip(self.given, self.live, strict=True) if not live)
        return [x for x in (*fixed, *self.within) if x.numel() > SMALL]

    def require_unchanged(self) -> None:
        """Raise, as torch does, where a constant was overwritten since; then the model is run again, with copies."""
        for x, live, version in zip(self.given, self.live, self.versions, strict=True):
            if not live and version_in(unwrapped(x)) != version:
                raise RuntimeError(
                    f"a constant that {self} computed with has been modified by an inplace operation before it was "
                    "compared with that on the reference: give it a copy"
                )

    def met_within(self, values: Sequence[object]) -> None:
        """Take down what the call met besides its arguments, as what a module reads that is nowhere in it."""
        self.within = [x.detach() for x in values if isinstance(x, Tensor)]
        self.others = [*self.others, *(x for x in values if not isinstance(x, Tensor))]

    def to_keep(self) -> Place:
        """The same for later runs, without what was attributed."""
        given = [
            torch.empty_like(x, device="meta") if live else x.clone() if x.numel() <= SMALL else x
            for x, live in zip(self.given, self.live, strict=True)
        ]
        within = [x.clone() if x.numel() <= SMALL else x for x in self.within]
        made_anew = [
            not live and start is not None and x.shape == start.shape and equal(x, start)
            for x, live, start in zip(self.given, self.live, self.starts, strict=True)
        ]
        return replace(self, given=given, within=within, made_anew=made_anew, picked=None)

    def meets(self, kept: Place) -> bool:
        """Whether an earlier call went as this one does, as far as that is no matter of attributed values."""
        if (self.name, self.numbers, self.live) != (kept.name, kept.numbers, kept.live):
            return False
        if self.module is not kept.module or self.others != kept.others:
            return False
        for ours, theirs in ((self.given, kept.given), (self.within, kept.within)):
            if [x.dtype for x in ours] != [x.dtype for x in theirs]:
                return False
        if not all(is_alike(x, other) for x, other in zip(self.within, kept.within, strict=True)):
            return False
        starts = [
            x.shape if start is None else start.shape
            for x, start in zip(kept.given, kept.starts, strict=True)
        ]
        shapes, others = (
            [*self.made, *(x.shape for x in self.given)],
            [*(z.shape for z in kept.before), *starts],
        )
        if len(shapes) != len(others) or not all(map(fits, shapes, others)):
            return False
        if masks_others(self, kept.starts):
            return False
        each = zip(self.given, kept.given, self.live, kept.starts, kept.made_anew, strict=True)
        return all(
            live or (equal(x, other) if anew else start is not None or is_alike(x, other))
            for x, other, live, start, anew in each
        )

    def fill_as(self, kept: Place) -> None:
        """Fill in what an earlier call met."""
        self.starts, self.before = kept.starts, kept.before
        self.other, self.chosen, self.infinite = kept.other, kept.chosen, kept.infinite

    def __str__(self) -> str:
        return f"{self.name}" + (f" in `{self.path}`" if self.path else "")


def masks_others(place: Place, starts: Sequence[Tensor | None]) -> bool:
    """Whether other values are masked in the first run than in the second: no way leads from infinity to a number."""
    each = zip(place.given, place.live, starts, strict=True)
    beside = [(x, start) for x, live, start in each if not live and start is not None]
    for x, start in beside:
        if x.dtype is torch.bool:
            filled = place.name in _FILLS and may_look_at(x)
            if filled and not bool((x == start).all()) and _has_masks(place):
                return True
        elif x.is_floating_point() and may_look_at(x):
            masks = masks_in(x), masks_in(start)
            if masks != (None, None) and not bool((masking(x) == masking(start)).all()):
                return True
    return False


_FILLS = ("masked_fill", "where")


def _has_masks(place: Place) -> bool:
    """Whether what is put in somewhere, or what is there, is infinite or nearly so."""
    values = [x for x in place.given if x.is_floating_point()]
    most = min((torch.finfo(x.dtype).max / 2 for x in values), default=torch.inf)
    return any(abs(number) > most for number in place.numbers) or any(bool(masking(x).any()) for x in values)
