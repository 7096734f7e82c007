"""Patching: what a part of a model does to the target, clean in place of corrupt; approximated, or done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.attribution.apart import Learnt, apart, axes_given
from tdhook.attribution.gradient import Gradient
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.lrp import LRP
from tdhook.attribution.parts import Parts
from tdhook.attribution.patches import Patches
from tdhook.attribution.sides import CLEAN, CORRUPT, SIDES, mixed_by_share, require_alike, sides
from tdhook.contexts.attribution import Attribution, Shared
from tdhook.conventions import relevance_of
from tdhook.keys import ASKED, parts_of, under
from tdhook.models.capture import INPUT
from tdhook.models.model import Model
from tdhook.passes.finite import are_finite
from tdhook.passes.forward import Run
from tdhook.passes.rows import values_of
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Question
from tdhook.passes.variants import Variants
from tdhook.relevance.composites.composite import PRESETS
from tdhook.relevance.secants.pair import difference
from tdhook.targets import TargetLike
from tdhook.targets.base import Seeder
from tdhook.targets.through import OfOperations, Place

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EDGE", "Patching"]

EDGE = "edge"
"""Where effects of edges are written: that from a module to another under ``("edge", path, path:input)``."""

Edge: TypeAlias = tuple[NestedKey, str]

BY_SHARE = "by_share"
"""The name of relevance patching by share."""

_NAMED: Mapping[str, Callable[[TargetLike], Attribution]] = {
    "atp": Gradient,
    BY_SHARE: lambda target: LRP("deeplift", target=target, baseline=0.0).in_gradients(),
    "eap_ig": lambda target: IntegratedGradients(target, steps=5, rule="middle"),
    "exact": Gradient,
}


class Patching(Attribution):
    """The effect of each part of a layer: what the target gains where it is as in the clean run and not the corrupt.

    ``effect = (a_clean - a_corrupt) * coefficient`` approximates it for all parts at once. The coefficient is what the
    method says that a unit of the activation counts, in the run that is patched: by the gradient this is attribution
    patching (AtP; Nanda 2023; Kramár et al. 2024), by LRP relevance patching (RelP; Jafari et al. 2025), by the
    gradient on the way from one run to the other EAP-IG (Hanna et al. 2024). With ``exact=True`` each part is
    patched, in a forward pass of its own.

    No coefficient is right for every part. Of a part that changes next to nothing the effect is by the gradient in the
    run that is patched, and of one that changes all by the secant between both runs. ``by_share=True`` goes from the
    one to the other by the part's share of the whole change, ``|effect_secant / change of the target|``, at most 1:
    ``effect = (1 - share) * effect_gradient + share * effect_secant``. That is exact where the target is quadratic on
    the way from one run to the other, and the part goes its share of that way.

    The model reads ``key``, and the explained module ``("clean", key)`` and ``("corrupt", key)``, or ``key`` where that
    is the same in both. Effects are written under ``("attr", place)``, ``[*batch, *parts]``; what is explained as it is
    in both runs under ``("ledger", "clean")`` and ``("ledger", "corrupt")``, its difference under
    ``("ledger", "target")``. What the target chooses (``"argmax"``) it chooses in the clean run. The outputs of the
    model that are written are those of the clean run.

    Args:
        by: the method that gives coefficients, which says what is explained too: ``Gradient``, ``LRP``,
            ``IntegratedGradients``. Or a name: ``"atp"``, ``"eap_ig"``, that of a preset of LRP (``"relp"``),
            ``"by_share"`` (LRP by ``deeplift`` between both runs, and ``by_share``), or ``"exact"``. A method that
            compares with a reference compares with the other run.
        target: what is explained, if not what the method says.
        at: places: paths of modules, for their outputs, ``"path:input"`` for what they are given, keys, or selectors of
            a single operation, ``First(Op("relu"))``, whose effects are written under ``("attr", repr(selector))``.
        edges: pairs of a place and a ``"path:input"`` behind it: the effect that the one has through that input alone,
            where what is patched is added to it (EAP; Syed et al. 2023). For modules that add to a residual
            stream which others read.
        axis: which axes of a layer tell its parts apart, the batch being the first, 0: ``axis=1`` are the tokens of
            ``[batch, tokens, features]``, ``axis=(1, -1)`` each value of each token; ``()`` makes one part of all. By
            default each value of the layer is a part.
        heads: the last of the axes (by default the last of the layer) is so many heads side by side.
        patch: which run is put into the other: ``"clean"``, so that an effect is what the clean value restores in the
            corrupt run (denoising), or ``"corrupt"``, what the corrupt value destroys in the clean one (noising). What
            speaks for the target of the clean run is positive in both.
        exact: whether to patch for real.
        by_share: whether effects go from those by the gradient to those by the method, each by its share of the whole
            change. It is for methods whose effects are complete between both runs: LRP with a baseline, and
            integrated gradients.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`, if not as the method has them.

    Raises:
        ValueError: there is no place, none of that name, or an edge that does not end at an input; when it is called:
            a place is never run, or differs in shape, or by what is infinite.
        KeyError: when it is called: an entry is missing on one side.
        TypeError: the method gives no coefficients.
    """

    sides = SIDES

    def __init__(
        self,
        by: Attribution | str,
        target: TargetLike = None,
        *,
        at: Sequence[Place] | Place = (),
        edges: Sequence[Edge] = (),
        axis: int | Sequence[int] | None = None,
        heads: int | None = None,
        patch: Literal["clean", "corrupt"] = "clean",
        exact: bool = False,
        by_share: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        if patch not in SIDES:
            raise ValueError(
                f"patch is 'clean' or 'corrupt', the run that is put into the other; got {patch!r}"
            )
        method = _method(by, target)
        method = method.asked(**options) if options else method
        super().__init__(**method.shared)
        self.method, self.patch, self.exact = method, patch, exact or by == "exact"
        self.by_share = by_share or by == BY_SHARE
        self.at = tuple(map(_place, [at] if isinstance(at, str | OfOperations) else at))
        if any(isinstance(place, OfOperations) for edge in edges for place in edge):
            raise TypeError(f"edges begin at modules and keys, and end at 'path:input'; got {list(edges)!r}")
        self.edges = tuple((unravel_key(source), end) for source, end in edges)
        self.parts = Parts.of(axis, heads)
        if not self.at and not self.edges:
            raise ValueError("nothing is patched: name places, at=['layers.0'], or edges")
        for source, end in self.edges:
            if not end.endswith(INPUT):
                raise ValueError(
                    f"the edge from {source!r} ends at {end!r}, and edges end at what a module is given: write "
                    f"'{end}{INPUT}'"
                )

    def __repr__(self) -> str:
        how = "exact" if self.exact else f"{self.method!r}{', by_share=True' if self.by_share else ''}"
        return f"Patching({how}, at={list(self.at)!r}, patch={self.patch!r})"

    @property
    def patches(self) -> tuple[object, ...]:
        """Which parts of which places are patched, and in which direction."""
        return self.at, self.edges, self.parts, self.patch

    def exactly(self) -> Patching:
        """The same, patched for real."""
        other = copy.copy(self)
        other.exact = True
        return other

    @property
    def question(self) -> Question:
        """What the method asks, at the places."""
        ends = [place for edge in self.edges for place in edge]
        operations = tuple(dict.fromkeys(place for place in self.at if isinstance(place, OfOperations)))
        named = (place for place in self.at if not isinstance(place, OfOperations))
        places = dict.fromkeys((*self.method.input_modules, *named, *ends))
        question = self.method.asked(input_modules=tuple(places)).question
        return replace(question, operations=operations)

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One run to be put into the other; there the method, or a forward pass for each part, as many as fit."""
        if runner.setup.question.target.places:
            raise ValueError(
                "an effect is one on the value of a target, and relevance through units is none: name the way by edges"
            )
        of_method, learnt = runner.state
        clean, corrupt = sides(runner.td)
        first = runner.on(clean)
        with first.forward(clean) as run:
            target, asked = first.pinned(run)
            values, there = {CLEAN: _value(run, runner.setup.question.target)}, _values(run)
        runner.base = first.as_it_is()
        here = corrupt.set(ASKED, asked.get(ASKED))
        if self.patch == CORRUPT:
            with runner.from_the_start(), runner.on(corrupt, target).forward(corrupt) as run:
                there = _values(run)
            here = asked
        on = runner.on(here, target)
        on.state = of_method
        with runner.from_the_start():
            small = {}
            if self.by_share and not self.exact:
                small = self._approximate(on, there, Gradient())
            if self.exact:
                written = self._exact(on, there, learnt)
            else:
                written = self._approximate(on, there, self.method)
        values[CORRUPT] = _value(on.as_it_is() if self.patch == CLEAN else run, target)
        _tell(runner, runner.base, values)
        change = runner.beside["ledger", "target"]
        runner.beside.update(written)
        runner.beside.update({key: mixed_by_share(small[key], written[key], change) for key in small})
        on.base = first.base = None  # their graphs
        return {}

    def _approximate(
        self, on: Runner, there: Mapping[NestedKey, Tensor], method: Attribution
    ) -> dict[NestedKey, Tensor]:
        if on.setup.question.operations:
            on.as_it_is()  # which operations are meant is told by the model as it is
        coefficients = method.explaining(on.setup.question.target).coefficients(on, on.td, there)
        run = on.as_it_is()
        require_alike(there, _values(run))
        written: dict[NestedKey, Tensor] = {}
        for name, source, end in self._pairs(run):
            rise = self._rise(run, source, there)
            amounts = relevance_of(rise, coefficients[end], "gradient")
            features = rise.shape[run.batch_dims([source])[source] :]
            summed = self.parts.summed(amounts, features, source)
            if not are_finite([summed]):
                raise ValueError(
                    f"effects of {'.'.join(parts_of(source))!r} are not finite: its difference is infinite where a "
                    "mask of one run is none of the other; patch for real, exact=True, or name a place in front of the "
                    "mask"
                )
            written[name] = _written(run, end, summed, amounts.dim() > rise.dim())
        return written

    def _exact(
        self, on: Runner, there: Mapping[NestedKey, Tensor], learnt: dict[NestedKey, Learnt]
    ) -> dict[NestedKey, Tensor]:
        written: dict[NestedKey, Tensor] = {}
        with on.forward(on.td) as run:
            require_alike(there, _values(run))
            variants = Variants(on, run)
            own = axes_given(run.td, None, on.setup.question.target)
            for name, source, end in self._pairs(run):
                x, into = (run.sources([key])[key].detach() for key in (source, end))
                lead = run.batch_dims([source])[source]
                change = difference(there[source], x)
                put = there[source] if source == end else into + change
                known = learnt.setdefault(name, Learnt())
                axes, _ = apart(variants, {end: into}, {end: put}, own, known)
                patches = Patches(change, into, put, self.parts, lead, source, variants.batch, axes)
                effects = patches.effects(variants, end)
                written[name] = effects if self.patch == CLEAN else -effects
        return written

    def _pairs(self, run: Run) -> Iterator[tuple[NestedKey, NestedKey, NestedKey]]:
        """Where an effect is written, the source that is patched, and the one that takes it: itself, or an input."""
        known = run.sources()
        for place in self.at:
            for key in _calls(run, place, known):
                yield under(self.attribution_key, key), key, key
        order = [*run.inputs, *run.keys, *((name,) for name in run.modules)]
        for source, end in self.edges:
            for key in _calls(run, source, known):
                for at in _calls(run, end, known):
                    if known[key].shape != known[at].shape:
                        raise ValueError(
                            f"the edge from {source!r} to {end!r} joins shapes {list(known[key].shape)} and "
                            f"{list(known[at].shape)}: what is patched is added to the input, so that they are one"
                        )
                    if order.index(key) > order.index(at):
                        raise ValueError(
                            f"there is no edge from {source!r} to {end!r}, which is given before the other has run"
                        )
                    yield under(EDGE, key, at), key, at

    def _rise(self, run: Run, source: NestedKey, there: Mapping[NestedKey, Tensor]) -> Tensor:
        """``a_clean - a_corrupt``."""
        rise = difference(there[source], run.sources([source])[source].detach())
        return rise if self.patch == CLEAN else -rise

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """What is explained, in both runs."""
        return (("ledger", CLEAN), ("ledger", CORRUPT), ("ledger", "target"))

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"edge"``, if there are any."""
        return (EDGE,) if self.edges else ()

    def runs_on(self, td: TensorDictBase) -> list[TensorDictBase]:
        """The clean batch and the corrupt one."""
        return list(sides(td))

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What the method reads."""
        return self.method.reads(td)

    def start(self, model: Model) -> tuple[Any, dict[NestedKey, Learnt]]:
        """What the method works out, and what is found out of the model at each place."""
        return self.method.start(model), {}

    def explaining(self, target: TargetLike) -> Patching:
        """The same for another target."""
        other = copy.copy(self)
        other.method = self.method.explaining(target)
        other.target, other.seeder = other.method.target, other.method.seeder
        return other

    def asked(self, **shared: Any) -> Patching:
        """The same, with other options of those that all methods take."""
        other = copy.copy(self)
        other.method = self.method.asked(**shared)
        Attribution.__init__(other, **other.method.shared)
        return other

    def learnt(self, state: tuple[Any, dict[NestedKey, Learnt]]) -> str:
        """What the method has seen, and along which axes elements depend on each other."""
        of_method, learnt = state
        together = {name: one.together for name, one in learnt.items()}
        return f"{self.method.learnt(of_method)} together {together}"


def _method(by: Attribution | str, target: TargetLike) -> Attribution:
    """The method that gives coefficients."""
    if isinstance(by, str):
        if by in PRESETS:
            return LRP(by, target=target).in_gradients()
        if by not in _NAMED:
            raise ValueError(
                f"no coefficients are named {by!r}: there are {', '.join(_NAMED)} and the presets of LRP, relp among "
                "them; or give a method"
            )
        return _NAMED[by](target)
    if type(by).coefficients is Attribution.coefficients:
        raise TypeError(
            f"{type(by).__name__} gives no coefficients of activations; Gradient, IntegratedGradients and LRP do"
        )
    if by.writes or by.writes_under:
        raise ValueError(f"{by!r} writes more than relevance, which effects have not: leave out ledger")
    by = by.in_gradients() if isinstance(by, LRP) else by
    return by if target is None else by.explaining(target)


def _place(place: Place) -> Place:
    """A place as it is written.

    Raises:
        TypeError: it selects modules.
    """
    if not isinstance(place, OfOperations):
        return unravel_key(place)
    if not place.reaches_operations:
        raise TypeError(
            f"{place!r} selects modules: name the path of one, or select an operation, First(Op('relu'))"
        )
    return place


def _values(run: Run) -> dict[NestedKey, Tensor]:
    return {key: x.detach() for key, x in {**run.inputs, **run.sources()}.items()}


def _calls(run: Run, place: Place, known: Mapping[NestedKey, Tensor]) -> list[NestedKey]:
    """The sources of a place: one for each call of a module."""
    keys = [key for key in run.calls(place) if key in known]
    if not keys:
        raise ValueError(
            f"there is nothing to patch at {place!r}: the model does not run it, the target does not depend on it, or "
            "what it gives is not floating-point"
        )
    return keys


def _value(run: Run, target: Seeder) -> Tensor:
    """What is explained, ``[*batch]`` or ``[outputs, *batch]``."""
    seeds = run.seeds(target)
    run.look_at_axes(seeds)
    return values_of(seeds, run.outputs.batch_size)


def _tell(runner: Runner, run: Run, values: Mapping[str, Tensor]) -> None:
    """Write the target of both runs, and its difference, ``[*batch]`` or ``[*batch, outputs]``."""
    told = {**values, "target": values[CLEAN] - values[CORRUPT]}
    several = values[CLEAN].dim() > run.outputs.batch_dims
    for name, value in told.items():
        runner.beside["ledger", name] = value.movedim(0, -1) if several else value


def _written(run: Run, key: NestedKey, value: Tensor, several: bool) -> Tensor:
    """``[*batch, *parts]``, or ``[*batch, outputs, *parts]``."""
    value = value if key in run.inputs else run.shaped(value, of=run.sources([key])[key], after=several)
    return value.movedim(0, run.outputs.batch_dims) if several else value
