"""The reference: a second run of a model, beside which the values of the first are seen.

Rules take down each of their calls in the first run, in order; the second run, on the reference, fills in what the same
calls met there. It comes after the first, whose choices and draws it repeats, and before the backward pass, in which
both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from reprlib import repr as _short
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.relevance.propagation.alike import SMALL, fits, is_alike, is_same
from tdhook.relevance.propagation.handles import Handles
from tdhook.tape.conditions import holds
from tdhook.tape.functions import may_look_at, unwrapped
from tdhook.tape.internals import is_plain, version_of
from tdhook.tape.masks import masking, masks_in
from tdhook.tape.sparse import equal
from tdhook.tape.trees import tree_leaves

__all__ = ["Parted", "Place", "Reference"]


class Parted(RuntimeError):
    """The model does something else on the reference than on the input."""


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

    @property
    def constants(self) -> list[Tensor]:
        """The large ones among the constants that went in, or were met within."""
        fixed = (x for x, live in zip(self.given, self.live, strict=True) if not live)
        return [x for x in (*fixed, *self.within) if x.numel() > SMALL]

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
        if _masks_others(self, kept.starts):
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


class Reference:
    """What the calls of one run met in another one.

    Attributes:
        running: whether the second run is on.
        decided: how far the second run takes the decisions of the first: whole numbers (1), such as which values were
            picked, with all that is read into Python, and truth values as well (2), that were computed of what is
            attributed there.
        reads: what the first run read off tensors into Python: by which function, where, and what, if it may decide.
        told: what parted the second run from the first, as far as a warning said so.
        path: tells where in the model the present call is.
        one: whether the second run has one row, which stands for all of the batch.
        handles: where functions hand over to the layers before them, in the first run.
        keys: what is another one on the reference.
    """

    def __init__(self) -> None:
        self.keys: tuple[NestedKey, ...] = ()
        self.handles = Handles()
        self.running = self.one = False
        self.decided = 0
        self.told: set[str] = set()
        self.decisions: list[Any] = []
        self.reads: list[tuple[str, str, object]] = []
        self.path: Callable[[], str] = str
        self.places: list[Place] = []
        self._at = self._decided_at = self._read_at = 0
        self._read_other = ""
        self._copies = False
        self._aside = 0
        self._versions: list[tuple[Tensor, int]] = []

    def __getstate__(self) -> dict[str, object]:
        return {"decided": self.decided, "used": self.handles.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.decided, self.handles.used = state["decided"], state["used"]

    def begin(self) -> None:
        """Begin a first run."""
        self.places, self.decisions, self.reads = [], [], []
        self.handles.begin()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take down nothing: a part of the first run is run once more."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The second run.

        Raises:
            Parted: it does not do what the first one did.
        """
        self._at, self._decided_at, self._read_at, self._read_other = 0, 0, 0, ""
        self.running, self._versions = True, []
        try:
            yield
            if self._at < len(self.places):
                raise Parted(_PARTED.format(f"{self.places[self._at]} is not reached there"))
            if self._read_other:
                raise Parted(_PARTED.format(self._read_other))
        finally:
            self.running = False

    @property
    def overwritten(self) -> bool:
        """Whether the second run has overwritten what it met; another one will keep copies."""
        found = any(version_of(unwrapped(x)) != version for x, version in self._versions)
        self._copies = self._copies or found
        self._versions = []
        return found

    def place(self, name: str, leaves: Sequence[object], module: object = None) -> Place:
        """Take down a call of the first run: what is called, maybe a module, with which leaves of arguments."""
        given, numbers = _parted(leaves)
        live = [x.requires_grad for x in given]
        place = Place(name, self.path(), [x.detach() for x in given], live, numbers)
        place.module, place.others = module, [x for x in leaves if type(x) in _PLAIN]
        if not self._aside:
            self.places.append(place)
        return place

    def follow(
        self, name: str, leaves: Sequence[object], run: Callable[[], Any], module: object = None
    ) -> Any:
        """Make a call of the second run, and fill in what it met."""
        place = self._next(name, module)
        given, numbers = _parted(leaves)
        place.chosen = False
        place.other = numbers != place.numbers
        self._check(place, [x.shape for x in place.given], given)
        place.starts = [
            None if not live and is_same(x, start) else self._kept(start)
            for x, live, start in zip(place.given, place.live, given, strict=True)
        ]
        if any(x is not None and not is_plain(x) for x in place.starts):
            raise Parted(_PARTED.format(f"{place} reads another sparse or nested tensor there"))
        if self.decided < 2 and _masks_others(place, place.starts):
            raise Parted(_PARTED.format(f"{place} masks other values there"))
        outputs = run()
        if self.decided and place.picked is not None:
            outputs, place.chosen = place.picked(given, outputs), True
        leaves_made = (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs)
        made = [z for z in leaves_made if isinstance(z, Tensor)]
        self._check(place, place.made, made)
        place.before = tuple(map(self._kept, made))
        return outputs

    def decision(self, result: Any) -> Any:
        """What was computed of attributed values and is none itself; in the second run maybe as the first had it."""
        if not self.running:
            if not self._aside:
                self.decisions.append(result)
            return result
        if self._decided_at >= len(self.decisions):
            raise Parted(_PARTED.format("more is decided there"))
        first = self.decisions[self._decided_at]
        self._decided_at += 1
        return result if not self.decided else _as_decided(first, result, truths=self.decided > 1)

    def read(self, name: str, number: object) -> object:
        """What the model reads off a tensor into Python; in the second run maybe as the first had it.

        Whole numbers and truth values decide: where to look, which way to go. If nothing else parts the runs, no call
        tells of it, since Python chooses among what is there already.
        """
        now = (name, self.path(), number if _decides(number) else None)
        if not self.running:
            if not self._aside:
                self.reads.append(now)
            return number
        at, self._read_at = self._read_at, self._read_at + 1
        if at >= len(self.reads) or self.reads[at] == now or self.reads[at][:2] != now[:2]:
            return number
        first = self.reads[at][2]
        if self.decided:
            return first
        where = f" in `{now[1]}`" if now[1] else ""
        self._read_other = (
            self._read_other or f"{name}(){where} is {_short(number)} there instead of {_short(first)}"
        )
        return number

    def moved(self, name: str, leaves: Sequence[object]) -> list[Tensor]:
        """Take down where data are moved to, or see that it is the same in the second run.

        Returns:
            The places that count: in the second run those of the first, where its decisions are taken over. They may
            be made off the tape, so that no decision is seen before.
        """
        places = [
            x for x in leaves if isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())
        ]
        if not self.running:
            if not self._aside:
                given = [x.detach() for x in places]
                nothing: list[Tensor | None] = [None] * len(given)
                self.places.append(Place(name, self.path(), given, [False] * len(given), [], starts=nothing))
            return places
        place = self._next(name)
        self._check(place, [x.shape for x in place.given], places)
        # Whole numbers are taken over first, truth values (masks) only then.
        taken = [self.decided > (x.dtype is torch.bool) for x in places]
        if not all(
            over or is_same(x, y) or holds(x == y)
            for x, y, over in zip(place.given, places, taken, strict=True)
        ):
            raise Parted(_PARTED.format(f"{place} moves other values there"))
        return [
            x if over and x.shape == y.shape else y
            for x, y, over in zip(place.given, places, taken, strict=True)
        ]

    def _next(self, name: str, module: object = None) -> Place:
        if self._at >= len(self.places):
            raise Parted(_PARTED.format(f"{name} is called there, where the model has ended else"))
        place = self.places[self._at]
        if place.name != name:
            raise Parted(_PARTED.format(f"{name} is called there instead of {place}"))
        if place.module is not module:
            raise Parted(_PARTED.format(f"another {name} is called there than {place}"))
        self._at += 1
        return place

    def _check(self, place: Place, now: Sequence[torch.Size], there: Sequence[Tensor]) -> None:
        shapes, others = list(map(list, now)), [list(x.shape) for x in there]
        same = shapes == others
        if self.one and not same:
            same = len(shapes) == len(others) and all(map(fits, shapes, others))
        if not same:
            raise Parted(_PARTED.format(f"{place} meets shapes {others} there instead of {shapes}"))

    def _kept(self, x: Tensor) -> Tensor:
        if self._copies:
            return x.detach().clone()
        kept = x.detach()
        self._versions.append((kept, version_of(unwrapped(kept))))
        return kept


_PARTED = (
    "the model does something else on the reference (baseline) than on the input, so that their difference cannot be "
    "followed: {}. Choose a reference that takes the same way, or hold the key fixed that decides it"
)


_PLAIN = (int, bool, str)


def _as_decided(first: Any, second: Any, *, truths: bool) -> Any:
    """The second result with the decisions of the first one."""
    if isinstance(second, tuple | list) and isinstance(first, tuple | list) and len(first) == len(second):
        made = [_as_decided(a, b, truths=truths) for a, b in zip(first, second, strict=True)]
        return type(second)(made) if type(second) in (tuple, list) else type(second)(*made)
    if not isinstance(second, Tensor) or not isinstance(first, Tensor) or second.is_floating_point():
        return second
    return first if truths or second.dtype is not torch.bool else second


def _decides(number: object) -> bool:
    """Whether what was read is whole numbers and truth values alone."""
    return all(map(_decides, number)) if isinstance(number, list) else isinstance(number, int)


def _parted(leaves: Sequence[object]) -> tuple[list[Tensor], list[float]]:
    """The tensors, and the plain numbers."""
    return [x for x in leaves if isinstance(x, Tensor)], [x for x in leaves if type(x) is float]


def _masks_others(place: Place, starts: Sequence[Tensor | None]) -> bool:
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
