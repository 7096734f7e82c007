"""The reference: a second run of a model, beside which the values of the first are seen.

Rules take down each of their calls in the first run, in order; the second run, on the reference, fills in what the same
calls met there. It comes after the first, whose choices and draws it repeats, and before the backward pass, in which
both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from reprlib import repr as _short
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.relevance.propagation.alike import fits, is_same
from tdhook.relevance.propagation.handles import Handles
from tdhook.relevance.propagation.places import Place, masks_others
from tdhook.tape.conditions import holds
from tdhook.tape.functions import apart, unwrapped
from tdhook.tape.internals import is_plain, version_of
from tdhook.tape.overwriting import version_in
from tdhook.tape.trees import tree_leaves

__all__ = ["Parted", "Reference"]


class Parted(RuntimeError):
    """The model does something else on the reference than on the input."""


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
        values = [
            x.detach() if is_live else apart(x.detach()) for x, is_live in zip(given, live, strict=True)
        ]
        place = Place(name, self.path(), values, live, numbers)
        place.module, place.others = module, [x for x in leaves if type(x) in _PLAIN]
        place.versions = [
            0 if is_live else version_in(unwrapped(x)) for x, is_live in zip(values, live, strict=True)
        ]
        if not self._aside:
            self.places.append(place)
        return place

    def follow(
        self, name: str, leaves: Sequence[object], run: Callable[[], Any], module: object = None
    ) -> Any:
        """Make a call of the second run, and fill in what it met."""
        place = self._next(name, module)
        place.require_unchanged()
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
        if self.decided < 2 and masks_others(place, place.starts):
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
