"""Differences that cannot be followed: those of values that are infinite on the reference, and numbers on the input.

What is computed of such a value may be a number all the same, as ``tanh`` of infinity is, and so may be what is
explained. No share of its difference leads back through that of the value, which is infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.reference import Reference
from tdhook.relevance.secants.pair import Grads, Pair, inner
from tdhook.tape.functions import may_look_at, parts, unwrapped
from tdhook.tape.internals import is_plain, is_wrapped

__all__ = ["mark_infinite", "missed", "require_followed"]


def mark_infinite(reference: Reference) -> None:
    """Take down which calls met values that are not finite on the reference: one sum for each value, and one look."""
    places = reference.places
    for place in places:
        place.infinite = False
    sums = [(place, x.sum().double()) for place in places for x in _met(place)]
    if not sums:
        return
    device = sums[0][1].device
    finite = torch.stack([x.to(device) for _, x in sums]).isfinite().tolist()
    # Sums of what is finite may be infinite: looked at again one by one.
    doubted = {id(place): place for (place, _), known in zip(sums, finite, strict=True) if not known}
    for place in doubted.values():
        place.infinite = not _are_finite(_met(place))


def require_followed(reference: Reference | None, place: Place, lost: Tensor) -> None:
    """See that nothing is lost in a call.

    Args:
        reference: what the call is compared with.
        place: the call.
        lost: whether something is, of each of its values or of all.

    Raises:
        ValueError: something is.
    """
    if reference is None or not bool(unwrapped(lost).any()):
        return
    maker = next((f", made by {one}," for one in reference.places if _makes_infinite(one)), "")
    keys = ", ".join(map(repr, reference.keys))
    raise ValueError(
        f"on the baseline of {keys}, {place} meets NaN or infinite values{maker} where there are numbers on the input, "
        "and no difference can be followed through it: compare with a baseline on which they are numbers, or mask out "
        "what makes others before it is computed"
    )


def missed(pair: Pair, grads: Sequence[Tensor], found: Grads) -> Tensor:
    """Whether a secant leads to less than all of the difference, though nothing else differs than its inputs.

    Args:
        pair: the call.
        grads: what each output counts per unit.
        found: what each input counts.
    """
    wanted = [inner(g, d) for g, d in zip(grads, pair.rises, strict=True)]
    given = [inner(g, d) for g, d in zip(found, pair.steps, strict=True) if g is not None]
    gap = _total(wanted) - _total(given)
    size = _total([x.abs() for x in (*wanted, *given)])
    less: Tensor = gap.abs() > torch.finfo(gap.dtype).eps ** 0.5 * size
    return less & (not pair.differs)


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in values]).sum() if values else torch.zeros(())


def _makes_infinite(place: Place) -> bool:
    """Whether a call made others of numbers on the reference."""
    given = _are_finite(_given(place)) and all(map(isfinite, place.numbers))
    return given and not _are_finite(_numbers(place.before))


def _met(place: Place) -> Iterator[Tensor]:
    """The numbers that a call met on the reference, and may be looked at."""
    return _numbers([*place.starts, *place.before])


def _given(place: Place) -> Iterator[Tensor]:
    """Likewise, those that went in, what is the same in both runs among them."""
    each = zip(place.given, place.starts, strict=True)
    return _numbers([x if start is None else start for x, start in each])


def _numbers(values: Sequence[Tensor | None]) -> Iterator[Tensor]:
    for x in values:
        if x is None or not (x.is_floating_point() or x.is_complex()) or is_wrapped(x):
            continue  # what was met inside torch.vmap cannot be read outside it
        if is_plain(x) and may_look_at(x):
            yield parts(x)


def _are_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in values)
