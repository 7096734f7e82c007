"""Through: of what another target explains, the relevance that passes some units inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.keys import ASKED
from tdhook.models.sites import Site
from tdhook.targets.base import Around, Seeder, Seeds
from tdhook.targets.contrasts import TargetLike, as_seeder
from tdhook.targets.outputs import Key, same_index
from tdhook.targets.units import ALL, NONE, Chosen, Layer, Units, UnitsLike, top_count

__all__ = ["OfOperations", "Place", "Through", "begun_at", "outwards"]


@runtime_checkable
class OfOperations(Protocol):
    """What selects operations: :class:`~tdhook.selectors.Op`, alone or with others."""

    @property
    def reaches_operations(self) -> bool:
        """Whether operations can be meant."""

    @property
    def anywhen(self) -> OfOperations:
        """What it would mean if it did not matter when an operation is performed."""

    def matches(self, site: Site) -> bool:
        """Whether the operation at ``site`` is meant."""


Place: TypeAlias = "NestedKey | OfOperations"
"""Where inside a model: the path of a module (``"features.3"``; ``"cell:1"`` is its second call, ``"out:input"`` what
it is given), a key that a TensorDictModule in it writes, or a selector of one operation."""


@dataclass(frozen=True, eq=False)
class Through(Around):
    """Of what a target explains, the relevance that passes some units of a layer.

    It is found in two steps: back from the target as far as the layer, and from there on, from these units alone. So
    the explanations of all units add up to that of the whole layer, and where nothing goes past the layer to that of
    the target (concept relevance propagation: Achtibat et al. 2023, eq. 5). Of any number of units the first step is
    one backward pass, and the second is as many at once as the memory budget allows.

    It is itself a target: ``Through(Through(target, "features.28", 3), "features.10", "all")`` asks what passes unit 3
    of the one layer, and then each unit of an earlier one.

    Args:
        target: what is explained.
        place: the layer: the path of a module, of which ``"path:1"`` is the second call where it runs several times,
            and ``"path:input"`` what it is given; a key that a TensorDictModule inside the model writes, or that the
            model reads; or a selector of a single operation, ``First(Op("relu"))``.
        units: which of its units: an ``int``; a tuple of them, together; a list of these, each separately, which gives
            relevance of shape ``[*batch, several, *features]``; ``"all"``, each separately; ``"top:8"``, each of the 8
            of the most relevance, by size, of which ``("units", place)``, ``[*batch, 8]``, says which they are; a
            tensor, or a :class:`~tdhook.targets.Key` or tuple key of an entry, with one for each element of the batch
            (``[*batch]``), with several, each separately (``[*batch, several]``), or with truth values that mark them
            (``[*batch, units]``). ``"none"``, where what goes past the layer is counted, leaves that alone.
        axis: of the layer, along which its units lie. The batch counts as one axis, the first, whatever its shape:
            ``axis=1`` are the channels of a convolution and the tokens of ``[batch, tokens, width]``, ``axis=-1`` is
            its width. By default the only axis that there is besides the batch.
        heads: the axis consists of so many equal parts, each of which is a unit.
        beside: what becomes of relevance that does not pass the layer (beside it, around it, as on the other branch of
            a residual block): ``"closed"`` leaves it out, ``"counted"`` leaves it in, and takes away the other units'
            alone, which is what a mask on the gradient does.

    Where the target explains several outputs, and several units are asked for, each unit of the first output comes
    first, then each of the second, and so on. In the ledger what did not pass the units is absorbed by a
    ``"condition"``.

    Raises:
        ValueError: when it is called: the target does not depend on the layer, or the layer on no input; it was called
            several times, or never; it has several axes and ``axis`` names none.
        IndexError: there is no such unit or axis.
        TypeError: the method only runs forwards.
    """

    target: TargetLike
    place: Place
    units: UnitsLike = ALL
    axis: int | None = None
    heads: int | None = None
    beside: Literal["closed", "counted"] = "closed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_seeder(self.target))
        place = self.place
        if isinstance(place, OfOperations):
            if not place.reaches_operations:
                raise TypeError(
                    f"{place!r} selects modules; name the path of one, or select an operation, First(Op('relu'))"
                )
        elif isinstance(place, str | tuple) and place:
            object.__setattr__(self, "place", unravel_key(place))
        else:
            raise TypeError(f"a place is a path, a key or a selector of an operation, got {place!r}")
        _check(self.units)
        if self.beside not in ("closed", "counted"):
            raise ValueError(f"beside is 'closed' or 'counted', got {self.beside!r}")
        if isinstance(self.units, str) and self.units == NONE and self.beside == "closed":
            raise ValueError(
                "no unit, and nothing past them, is nothing: units='none' goes with beside='counted'"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Through):
            return NotImplemented
        same = self.target == other.target and self.place == other.place and self.layout == other.layout
        return same and self.beside == other.beside and same_index(self.units, other.units)

    def __hash__(self) -> int:
        return hash((self.target, self.place, self.layout, self.beside))

    def inner(self) -> Seeder:
        """What is explained."""
        assert isinstance(self.target, Seeder)
        return self.target

    def around(self, other: Seeder) -> Through:
        """What passes these units of another target."""
        return replace(self, target=other)

    @property
    def layout(self) -> Units:
        """How the units lie in the layer."""
        return Units(self.axis, self.heads)

    @property
    def places(self) -> tuple[Place, ...]:
        """The layer, after those that the target passes before it."""
        return (*self.inner().places, self.place)

    @property
    def key(self) -> NestedKey | None:
        """The entry that names the units, if one does."""
        units = self.units
        if isinstance(units, tuple) and isinstance(units[0], str):
            return units
        return units.key if isinstance(units, Key) else None

    @property
    def by_element(self) -> bool:
        """Whether each element of the batch has units of its own."""
        return top_count(self.units) is not None or self.key is not None or isinstance(self.units, Tensor)

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of the target, and the one that names units."""
        entries = self.inner().entries
        if entries is None:
            return None
        return list(entries) if self.key is None else [*entries, self.key]

    @property
    def tells(self) -> tuple[tuple[str, ...], ...]:
        """Which units were found to matter most, where these are asked for."""
        ours = () if top_count(self.units) is None else (("units", _named(self.place)),)
        return (*self.inner().tells, *ours)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """Not found from outputs alone: :meth:`~tdhook.passes.forward.Run.seeds` finds it, on the way back."""
        raise TypeError(
            f"what passes units of {_named(self.place)!r} is found on the way back through the model, and not from its "
            "outputs: whatever is said of it goes around the target inside, Through(AtStep(target), ...); a method or "
            "measure that runs the model forwards alone takes that target itself"
        )

    def choose(
        self,
        layer: Layer,
        arrived: Tensor,
        outputs: TensorDictBase,
        inputs: TensorDictBase,
        flow: Convention,
        rise: Tensor | None = None,
    ) -> Chosen:
        """The units that are meant.

        Args:
            layer: the layer.
            arrived: at it, ``[*layer]`` or ``[outputs, *layer]``.
            outputs: what the model wrote.
            inputs: what it was given.
            flow: the convention in which it arrived.
            rise: how far the layer's value is from what it is on a reference; by default its value.
        """
        kept = inputs.get(self._kept, None)
        if kept is not None:
            several = kept.dim() > len(layer.batch) + 1
            marks = kept.movedim(len(layer.batch), 0) if several else kept
            return Chosen(marks != 0, len(marks) if several else None)
        amounts = arrived.new_zeros(())
        if top_count(self.units) is not None:
            if arrived.dim() > layer.value.dim():
                raise ValueError(
                    f"the units of {layer.name} that matter most are not the same for each of several outputs: name "
                    "one output, or the units"
                )
            relevance = relevance_of(layer.value if rise is None else rise, arrived, flow)
            amounts = self.layout.pooled(relevance, layer)
        return self.layout.choose(self.units, layer, amounts, outputs, inputs)

    def onward(
        self,
        begun: Seeds,
        layer: Layer,
        arrived: Tensor,
        chosen: Chosen,
        handed: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Seeds:
        """Where the backward pass goes on.

        Args:
            begun: where it started.
            layer: the layer.
            arrived: at it, ``[*layer]`` or ``[outputs, *layer]``.
            chosen: the units that it goes on from.
            handed: places beside the layer, and what arrived there, of the same shapes.
        """
        marks = self.layout.spread(chosen.marks, layer)
        outputs, units = begun.several, chosen.several
        counted = self.beside == "counted"
        several = outputs if units is None else units * (1 if outputs is None else outputs)

        def passing(x: Tensor) -> Tensor:
            wide = x if units is None else x.unsqueeze(-layer.value.dim() - 1)
            grad = torch.where(marks, 0.0, -wide) if counted else torch.where(marks, wide, 0.0)
            return grad.flatten(0, 1) if outputs is not None and units is not None else grad

        grad, ours = passing(arrived), [(place, passing(x)) for place, x in handed]
        keys: list[NestedKey] = [("through", layer.name)]
        whole = begun if begun.whole is None else begun.whole
        if units is not None:
            whole = _repeated(whole, units)
        if not counted:
            return Seeds(keys, [layer.value], [grad], several, whole, ours)
        wider = begun if units is None else _repeated(begun, units)
        return Seeds(
            [*begun.keys, *keys],
            [*begun.tensors, layer.value],
            [*wider.grads, grad],
            several,
            whole,
            [*wider.handed, *ours],
        )

    def pinned(
        self, inner: Seeder, chosen: Chosen, batch_dims: int
    ) -> tuple[Through, dict[NestedKey, Tensor]]:
        """The same with the choice made, and the entry ``[*batch, ...]`` that holds it from now on."""
        if top_count(self.units) is None and self.key is None:  # they are the same whatever becomes of inputs
            return self.around(inner), {}
        marks = chosen.marks if chosen.several is None else chosen.marks.movedim(0, batch_dims)
        return _Kept(inner, self.place, self.units, self.axis, self.heads, self.beside), {self._kept: marks}

    @property
    def _kept(self) -> NestedKey:
        return (ASKED, f"units {len(self.places)}")


class _Kept(Through):
    """Units that were chosen before: an entry of the inputs holds them."""

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of the target, and the one that holds them."""
        entries = super().entries
        return None if entries is None else [*entries, self._kept]

    @property
    def tells(self) -> tuple[tuple[str, ...], ...]:
        """It was told when they were chosen."""
        return ()


def outwards(target: Seeder) -> Seeder:
    """The same target with units outermost: what is said of when, or of which rows, is said of what is explained.

    ``AtStep(Through(target, ...))`` becomes ``Through(AtStep(target), ...)``.
    """
    if isinstance(target, Through) or not isinstance(target, Around) or not target.places:
        return target
    inner = outwards(target.inner())
    if not isinstance(inner, Through):
        return target
    said = target.around(inner.inner())
    return target if said is None else inner.around(outwards(said))


def tells_units(target: Seeder) -> bool:
    """Whether the relevance of an explanation says which units are meant."""
    target = outwards(target)
    return isinstance(target, Through) and (
        top_count(target.units) is not None or tells_units(target.inner())
    )


def named_units(target: Seeder) -> Seeder:
    """The same target of units that an explanation has told, where their numbers are entries under its names."""
    target = outwards(target)
    if not isinstance(target, Through):
        return target
    units = target.units if top_count(target.units) is None else Key(target.tells[-1])
    return replace(target, target=named_units(target.inner()), units=units)


def begun_at(target: Seeder) -> Seeder:
    """What is explained, whatever it passes."""
    target = outwards(target)
    return begun_at(target.inner()) if isinstance(target, Through) else target


def _repeated(seeds: Seeds, times: int) -> Seeds:
    """Each of them so many times, one after the other."""

    def repeated(grad: Tensor) -> Tensor:
        return grad.expand(times, *grad.shape) if seeds.several is None else grad.repeat_interleave(times, 0)

    grads, handed = map(repeated, seeds.grads), [(place, repeated(grad)) for place, grad in seeds.handed]
    return Seeds(seeds.keys, seeds.tensors, list(grads), times * (seeds.several or 1), handed=handed)


def _named(place: Place) -> str:
    return place if isinstance(place, str) else ".".join(place) if isinstance(place, tuple) else repr(place)


def _check(units: object) -> None:
    """Raise for what cannot name units."""
    if isinstance(units, str):
        top = units.removeprefix("top:")
        if units not in (ALL, NONE) and not (top != units and top.isdigit() and int(top) > 0):
            raise ValueError(
                f"units={units!r} is neither 'all' nor 'top:8'; to take them from an entry, write Key({units!r})"
            )
        return
    if isinstance(units, Key | Tensor) or _is_int(units):
        return
    listed: Sequence[object] = units if isinstance(units, list | tuple) else ()
    ints = bool(listed) and all(map(_is_int, listed))
    keys = isinstance(units, tuple) and all(isinstance(name, str) for name in listed)
    groups = isinstance(units, list) and all(
        _is_int(one) or (isinstance(one, tuple) and one and all(map(_is_int, one))) for one in listed
    )
    if not listed or not (ints or keys or groups):
        raise TypeError(
            f"units are an int, a tuple of ints, a list of these, 'all', 'top:8', a key or a tensor; got {units!r}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
