"""Runs: what one forward pass on the tape left behind, and how it is pulled back from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.keys import parts_of
from tdhook.models.capture import calls_of
from tdhook.models.entries import entries_of, frames_of, is_flat
from tdhook.models.sites import Performance
from tdhook.passes.axes import is_folded, out_of_order, rows_elsewhere
from tdhook.passes.diagnosis import is_explainable, why_not_finite, why_relevance_is_not
from tdhook.passes.finite import Disregarding, are_finite
from tdhook.passes.order import look_at_order, look_at_rows, pulled_of
from tdhook.passes.performed import Output
from tdhook.passes.setup import Setup
from tdhook.passes.within import Against
from tdhook.tape.conditions import is_traced
from tdhook.tape.functions import independent
from tdhook.tape.picking import Rows, rows_of
from tdhook.targets.base import Seeder, Seeds, require_dependence
from tdhook.targets.pinned import pin
from tdhook.targets.through import OfOperations, Place, Through, outwards
from tdhook.targets.units import Chosen, Layer

__all__ = ["Run"]


@dataclass
class Run:
    """What one forward pass left behind.

    Attributes:
        setup: what the explained module keeps from call to call.
        td: what the model was run on.
        inputs: the attributed inputs, leaves of the graph.
        outputs: what the model wrote and the target computed of it, on the graph, in the batch shape of ``td``.
        flat: whether the model ran on a flat batch, whose leading axis ``modules`` and ``keys`` have.
        modules: outputs of the modules that were asked for, by path and call, on the graph.
        keys: values of the inner keys that were asked for, on the graph.
        performed: outputs of the operations that were asked for, on the graph.
        told: what the target found out of what it explains, to be written too.
        looked: whether it was seen which rows of these are which elements.
    """

    setup: Setup
    td: TensorDictBase
    inputs: dict[NestedKey, Tensor]
    outputs: TensorDictBase
    flat: bool
    modules: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[NestedKey, Tensor] = field(default_factory=dict)
    performed: dict[OfOperations, list[Output]] = field(default_factory=dict)
    told: dict[NestedKey, Tensor] = field(default_factory=dict)
    looked: bool = False

    def seeds(self, target: Seeder, flow: Convention = "gradient", against: Against | None = None) -> Seeds:
        """Where the backward pass starts: at outputs, or inside the model, where a target passes some units alone.

        Args:
            target: what is explained.
            flow: the convention in which the backward pass runs.
            against: the reference, where the difference from there is explained.

        Raises:
            ValueError: a value that is explained is not finite.
        """
        if target.places:
            target = outwards(target)
            if isinstance(target, Through):
                return self._onward(target, flow, against)[0]
        seeds = target(self.offered(), self.td, flow if against is None else "gradient")
        for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
            if not is_explainable(z, grad):
                model, in_keys = self.setup.model, self.setup.leaves.in_keys
                raise ValueError(why_not_finite(model, in_keys, key, self._as_run()))
        return seeds if against is None else against.rises(seeds)

    def _as_run(self) -> TensorDictBase:
        """What the model was run on, with values that took the place of others."""
        td = self.td.copy()
        for key, x in self.inputs.items():
            value = td.get(key, None)
            if isinstance(value, Tensor) and value.is_floating_point():
                td.set(key, x.detach())
        return td

    def pinned(self, target: Seeder) -> tuple[Seeder, dict[NestedKey, Tensor]]:
        """A target that has chosen, and the entries ``[*batch, ...]`` that hold what."""
        target = outwards(target)
        if not isinstance(target, Through):
            return pin(target, self.offered(), self.td)
        inner, kept = self.pinned(target.inner())
        _, chosen = self._onward(target, "gradient", None)
        through, ours = target.pinned(inner, chosen, self.td.batch_dims)
        return through, {**kept, **ours}

    def _onward(self, target: Through, flow: Convention, against: Against | None) -> tuple[Seeds, Chosen]:
        """Where the backward pass goes on from some units, and which these are."""
        layer = self.layer(target.place)
        if not torch.is_grad_enabled():
            raise TypeError(
                f"what passes units of {layer.name} is found on the way back, and this method runs the model forwards "
                "alone: explain by one that takes gradients, or explain what is behind the units"
            )
        begun = self.seeds(target.inner(), flow, against)
        name: NestedKey = ("through", layer.name)
        places, axis = ((), 0) if against is None else against.beside(layer.value)
        beside = {("through", layer.name, f"{i}"): place for i, place in enumerate(places)}
        found = self.pull(begun, {name: layer.value, **beside}, passing=layer.name)
        if target.by_element:
            self._require_order(layer)
        rise = None if against is None else against.rise(name, layer.value)
        chosen = target.choose(layer, found[name], self.offered(), self.td, flow, rise)
        if chosen.numbers is not None:
            self.told.update(dict.fromkeys(target.tells[-1:], chosen.numbers))
        # As the layer lies, on the way to where they do.
        handed = [
            (place.movedim(axis, 0), found[key].movedim(axis - place.dim(), -place.dim()))
            for key, place in beside.items()
        ]
        return target.onward(begun, layer, found[name], chosen, handed), chosen

    def _require_order(self, layer: Layer) -> None:
        """See that units of each element are those of that element.

        Raises:
            ValueError: elements lie in another order.
        """
        for name in self.setup.axes.out_of_order:
            if self.modules.get(name) is layer.value and self._is_folded(layer.value):
                raise ValueError(out_of_order(name, layer.value.shape, self.td.batch_size))
        for name in self.setup.axes.elsewhere:
            if self._looked_at.get(name) is layer.value:
                raise ValueError(rows_elsewhere(name, layer.value.shape, self.td.batch_size))

    def layer(self, place: Place) -> Layer:
        """The layer at a place that the target names.

        Raises:
            ValueError: the model did not come there, or several times.
        """
        keys = {**self.keys, **self.inputs}
        inside, batch = self.setup.inside, self.td.batch_size
        return inside.layer(place, batch, self.modules, keys, self.performed, self.flat)

    def passed(self) -> dict[NestedKey, Tensor]:
        """The values of the layers that the target names, by the names that they have in seeds."""
        layers = map(self.layer, self.setup.question.target.places)
        return {("through", layer.name): layer.value for layer in layers}

    def offered(self) -> TensorDictBase:
        """What may be explained: the outputs, and those of ``target_modules`` by path and call."""
        if not self.setup.target_modules:
            return self.outputs
        outputs: TensorDictBase = self.outputs.copy()
        for name in self._calls(self.setup.target_modules):
            outputs.set((name,), self.shaped(self.modules[name]))
        return outputs

    def independent_sources(self) -> list[dict[NestedKey, Tensor]]:
        """The values that are attributed, detached, in groups that depend on none of their own group."""
        sources = self.sources()
        # Inputs are where the tape begins: none depends on another.
        alone = bool(sources) and sources.keys() <= self.inputs.keys()
        groups = [list(sources)] if alone else independent(sources)
        return [{key: sources[key].detach() for key in group} for group in groups]

    def ends(self, sources: Mapping[NestedKey, Tensor]) -> list[Tensor]:
        """Where what is pulled back ends: the inputs and sources that depend on no other of these, each once."""
        found = {**self.inputs, **sources}
        return list({id(found[key]): found[key] for key in independent(found)[0]}.values()) if found else []

    def sources(self, among: Iterable[NestedKey] | None = None) -> dict[NestedKey, Tensor]:
        """The values that are attributed, on the graph, by the key that their relevance is written under.

        Args:
            among: which of them; all by default.
        """
        setup = self.setup
        if among is None and not setup.collects and setup.attribute is None:
            return self.inputs
        found = {**self.keys, **self.inputs}
        wanted = list(setup.attributed)
        if setup.attribute == "all":
            wanted += [key for key in self.keys if key not in wanted]
        elif callable(setup.attribute):
            wanted = list(self.inputs)
        sources: dict[NestedKey, Tensor] = {}
        for key in wanted:
            below = (
                [key]
                if key in found
                else [k for k in self.inputs if parts_of(k)[: len(parts_of(key))] == parts_of(key)]
            )
            sources.update((k, found[k]) for k in below)
        sources.update({(name,): self.modules[name] for name in self._calls(setup.input_modules)})
        sources.update({(repr(place),): self._output(place) for place in setup.question.operations})
        chosen = sources if among is None else set(among)
        return {key: x for key, x in sources.items() if x.requires_grad and key in chosen}

    def _output(self, place: OfOperations) -> Tensor:
        """The output of an operation, of which the batch is in front."""
        layer = self.layer(place)
        if layer.folded or layer.lead != (1 if self.flat else self.td.batch_dims):
            raise ValueError(
                f"{layer.name} gives {list(layer.value.shape)}, in front of which are not the axes of the batch "
                f"{list(self.td.batch_size)}: choose an operation of values of each element"
            )
        return layer.value

    @property
    def meant(self) -> dict[Performance, OfOperations]:
        """Which operations are attributed, as far as they are told apart."""
        found = ((place, self.performed.get(place, ())) for place in self.setup.question.operations)
        return {outputs[0].performance: place for place, outputs in found if len(outputs) == 1}

    def calls(self, name: Place) -> list[NestedKey]:
        """The sources that a key names, the path of a module (one for each of its calls), or a selector."""
        if isinstance(name, OfOperations):
            return [(repr(name),)]
        key = unravel_key(name)
        if key in self.keys or key in self.inputs:
            return [key]
        return [(call,) for call in self._calls((key,))] if isinstance(key, str) else []

    def _calls(self, paths: tuple[str, ...]) -> list[str]:
        """The names of all calls of some modules, as far as they were called."""
        return [name for path in paths for name in calls_of(path, self.modules)]

    def pull(
        self,
        seeds: Seeds,
        sources: Mapping[NestedKey, Tensor],
        *,
        keep: bool = False,
        passing: str | None = None,
    ) -> dict[NestedKey, Tensor]:
        """Run the backward pass.

        Args:
            seeds: where it starts.
            sources: where it ends.
            keep: whether accounts are kept of every value on the tape.
            passing: where inside the model it ends, in words, if not at what is attributed.

        Returns:
            What arrives at each source, detached and of its shape, after a leading axis ``[outputs]`` where several
            are explained; zero where nothing does.

        Raises:
            ValueError: the target depends on none of the sources, or what arrives is not finite.
        """
        require_dependence(seeds, sources, [z.requires_grad for z in seeds.tensors])
        self.look_at_axes(seeds)
        ends = list(sources.values())
        # This pass is as torch makes it, which notices where a value that was kept has been overwritten.
        pulled = self.setup.pull_back(seeds, ends, keep=True)
        if keep:
            Disregarding(seeds.tensors, looks=False)
        if not are_finite(pulled):
            past = Disregarding(seeds.tensors)
            pulled = self.setup.pull_back(seeds, ends, keep=True)
            if not are_finite(pulled):
                dtype = next(x.dtype for x in pulled if x is not None and not are_finite([x]))
                raise ValueError(why_relevance_is_not(self.setup.model, list(sources), dtype, past.culprit))
        for grad in pulled:
            if grad is not None:
                break
        else:
            require_dependence(seeds, sources, [False], passing)
        several = () if seeds.several is None else (seeds.several,)
        return {
            key: value.new_zeros((*several, *value.shape)) if grad is None else grad.detach()
            for (key, value), grad in zip(sources.items(), pulled, strict=True)
        }

    def look_at_axes(self, seeds: Seeds) -> None:
        """Find the batch axes that sizes do not tell, by backward passes of the batch's first and last element.

        Raises:
            ValueError: the model has made several of them one, in another order.
        """
        axes, batch = self.setup.axes, self.td.batch_size
        if axes.unsure:
            size = batch.numel()
            unsure = {name: z for name, z in self.modules.items() if axes.unsure.get(name) == size}
            ends = {0: (0,) * len(batch), size - 1: tuple(length - 1 for length in batch)}
            pulled = {n: pulled_of(self.setup.pull_back, seeds, at, unsure) for n, at in ends.items()}
            axes.learn(pulled, size, moved=rows_of(seeds.tensors, size) is not Rows.KEPT)
        if not self.flat and self.td.batch_dims > 1 and self.modules and not is_traced():
            look_at_order(axes, self.setup.pull_back, seeds, self.inputs, self.modules, batch)
        if not self.looked and (self.modules or self.performed) and batch.numel() > 1 and not is_traced():
            self.looked = True
            passed = {repr(place) for place in self.performed if place not in self.setup.question.operations}
            look_at_rows(axes, self.setup.pull_back, seeds, self.inputs, self._looked_at, batch, passed)

    @property
    def _looked_at(self) -> dict[str, Tensor]:
        """The outputs of modules and operations by name."""
        single = {repr(place): found[0].value for place, found in self.performed.items() if len(found) == 1}
        return {**self.modules, **single}

    @property
    def is_unsure(self) -> bool:
        """Whether no backward pass has told yet which axes of values inside the model are the batch's."""
        axes, batch = self.setup.axes, self.td.batch_size
        seen = self.looked or not self.modules or batch.numel() < 2
        if not seen and any(axes.rows.get(name, True) for name in self.modules):
            return True
        if any(axes.unsure.get(name) == batch.numel() for name in self.modules):
            return True
        return not self.flat and len(batch) > 1 and bool(axes.folded(self.modules, batch))

    def everything(self) -> Seeds:
        """All that the model wrote, as far as it is on the tape."""
        found = {key: z for key, z in entries_of(self.outputs) if isinstance(z, Tensor) and z.requires_grad}
        return Seeds(list(found), list(found.values()), [torch.ones_like(z) for z in found.values()])

    def in_batch_shape(self, key: NestedKey, value: Tensor, source: Tensor) -> Tensor:
        """What belongs to a source, as ``[*batch, *features]`` or ``[*batch, outputs, *features]``.

        Args:
            key: the source.
            value: of the shape of the source, or after one more leading axis ``[outputs]``.
            source: its value.
        """
        several = value.dim() > source.dim()
        if key not in self.inputs:
            value = self.shaped(value, of=source, after=several)
        return value.movedim(0, self.outputs.batch_dims) if several else value

    def batch_dims(self, sources: Iterable[NestedKey]) -> dict[NestedKey, int]:
        """How many leading axes of each source are those of the batch."""
        own, inner = self.td.batch_dims, {(name,): z for name, z in self.modules.items()}
        return {
            key: own if key in self.inputs or not self._is_folded(inner.get(key)) else 1 for key in sources
        }

    def _is_folded(self, value: Tensor | None) -> bool:
        """Whether a value from inside the model has the axes of the batch as one."""
        batch = self.td.batch_size
        if self.flat or value is None or len(batch) < 2:
            return self.flat
        return is_folded(value, batch)

    def shaped(self, value: Tensor, *, of: Tensor | None = None, after: bool = False) -> Tensor:
        """A value from inside the model in the batch shape of ``td``.

        Args:
            value: with the axes of the batch as they are there.
            of: what it belongs to there; by default it is that itself.
            after: whether it has one more leading axis.
        """
        if not self._is_folded(value if of is None else of):
            return value
        lead = value.shape[:after]
        return value.reshape((*lead, *self.outputs.batch_size, *value.shape[after + 1 :]))

    def values(self) -> dict[NestedKey, Tensor]:
        """The values that are wanted, ``[*batch, *features]``, by key or by path and call."""
        setup, wanted = self.setup, self.setup.question.values
        if wanted is True:
            return {key: self.in_batch_shape(key, x, x).detach() for key, x in self.sources().items()}
        found: dict[NestedKey, Tensor] = {}
        for key in setup.valued_keys:
            value = self.keys.get(key, None)
            value = self.td.get(key) if value is None else self.shaped(value)
            found[key] = value.detach()
        for name in self._calls(tuple(setup.valued_modules)):
            found[(name,)] = self.shaped(self.modules[name]).detach()
        return found

    def written(self) -> dict[NestedKey, Any]:
        """What the model wrote, detached."""
        if is_flat(self.outputs):
            return {key: value.detach() for key, value in self.outputs.items()}
        found: dict[NestedKey, Any] = dict(frames_of(self.outputs, self.td))
        for key, value in entries_of(self.outputs):
            found[key] = value.detach() if isinstance(value, Tensor) else value
        return found
