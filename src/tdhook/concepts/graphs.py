"""Attribution graphs: how much relevance goes from each unit of a layer to each unit of those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.concepts.reading import path_of, written_at
from tdhook.contexts.attribution import Attribution
from tdhook.keys import parts_of
from tdhook.passes.rows import is_close
from tdhook.tape.axes import beside
from tdhook.targets import Seeder, Through, Units
from tdhook.targets.units import Layer
from tdhook.targets.weighed import Weighed

__all__ = ["AttributionGraph", "Node", "attribution_graph"]


@dataclass(frozen=True, order=True)
class Node:
    """A unit of a layer, or of an input.

    Attributes:
        layer: path of the layer, or key of the input.
        unit: its number.
    """

    layer: str
    unit: int

    def __str__(self) -> str:
        return f"{self.layer}[{self.unit}]"


@dataclass(frozen=True)
class AttributionGraph:
    """The relevance of units, and how much of it each hands on to each unit before it.

    A node's relevance is what it hands on, over all edges that lead from it to earlier layers and to inputs, and what
    is absorbed on the way there (biases, stabilisers): :meth:`absorbed`. What it was handed is all of its relevance but
    for what it has of the target directly.

    Where elements of the batch depend on each other, as the steps of a recurrent policy do, an edge is what a unit
    hands on in all elements to the earlier one in that element.

    Attributes:
        relevance: by layer, inputs first, ``[*batch, units]``.
        edges: by layer and earlier layer, ``[*batch, units, units of the earlier layer]``, of relevance that passes no
            layer in between.
        gap: by layer, what was lost or made of each unit's relevance without a reason on its way to the inputs,
            ``[*batch, units]``; empty where the method keeps no ledger.
        batch: the batch size.
        inputs: which of the layers are inputs.
        kept: by layer, the units that are in the graph, ``[units]`` truth values.
        kept_back: by layer, what each unit does not hand on, ``[*batch, units]``; by default what its edges leave.
    """

    relevance: dict[str, Tensor]
    edges: dict[tuple[str, str], Tensor]
    gap: dict[str, Tensor]
    batch: torch.Size
    inputs: tuple[str, ...] = ()
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_back: dict[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers, inputs first."""
        return list(self.relevance)

    def absorbed(self, layer: str) -> Tensor:
        """What each unit of a layer does not hand on, ``[*batch, units]``; nothing of inputs, where relevance ends.

        Of elements that depend on each other each has its share of what the unit does not hand on in all of them.
        """
        if layer in self.inputs:
            return torch.zeros_like(self.relevance[layer])
        if layer in self.kept_back:
            return self.kept_back[layer]
        found = self.relevance[layer].clone()
        for (later, _), amounts in self.edges.items():
            if later == layer:
                found -= amounts.sum(-1)
        return found

    def direct(self, layer: str) -> Tensor:
        """What each unit has of the target that no later layer handed on, ``[*batch, units]``."""
        found = self.relevance[layer].clone()
        for (_, earlier), amounts in self.edges.items():
            if earlier == layer:
                found -= amounts.sum(-2)
        return found

    def mean(self) -> AttributionGraph:
        """The graph of the mean over all elements of the batch."""
        return self._each(
            lambda x: x.flatten(0, len(self.batch) - 1).mean(0) if self.batch else x, torch.Size()
        )

    def __getitem__(self, element: int | tuple[int, ...]) -> AttributionGraph:
        """The graph of one element of the batch, or of some."""
        return self._each(lambda x: x[element], torch.empty(self.batch, device="meta")[element].shape)

    def _each(self, change: Callable[[Tensor], Tensor], batch: torch.Size) -> AttributionGraph:
        return AttributionGraph(
            {key: change(x) for key, x in self.relevance.items()},
            {key: change(x) for key, x in self.edges.items()},
            {key: change(x) for key, x in self.gap.items()},
            batch,
            self.inputs,
            self.kept,
            {key: change(x) for key, x in self.kept_back.items()},
        )

    def pruned(self, share: float) -> AttributionGraph:
        """The same with the fewest units of each layer that have, by size, so much of its relevance.

        Args:
            share: 0 to 1, of the sum of the absolute relevance, summed over the batch.

        Raises:
            ValueError: it is another number.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share is more than 0 and at most 1, got share={share}")
        kept = {}
        for layer, amounts in self.relevance.items():
            size = amounts.abs().reshape(-1, amounts.shape[-1]).sum(0)
            order = size.argsort(descending=True)
            before = size[order].cumsum(0) - size[order]
            kept[layer] = torch.zeros_like(size, dtype=torch.bool).scatter_(
                0, order, before < share * size.sum()
            )
        return replace(self, kept=kept)

    def nodes(self) -> dict[Node, float]:
        """The relevance of each unit that is kept.

        Raises:
            ValueError: it is of several elements of a batch.
        """
        self._require_one()
        return {
            Node(layer, unit): float(amounts[unit])
            for layer, amounts in self.relevance.items()
            for unit in self._units(layer)
        }

    def links(self) -> dict[tuple[Node, Node], float]:
        """What goes from each unit to each earlier one, where both are kept and it is not nothing.

        Raises:
            ValueError: it is of several elements of a batch.
        """
        self._require_one()
        found = {}
        for (later, earlier), amounts in self.edges.items():
            for above in self._units(later):
                for below in self._units(earlier):
                    if amounts[above, below] != 0:
                        found[Node(later, above), Node(earlier, below)] = float(amounts[above, below])
        return found

    def to_tensordict(self) -> TensorDict:
        """As data: ``("nodes", layer)``, ``("edges", later, earlier)``, ``("gap", layer)``."""
        td = TensorDict(batch_size=self.batch)
        for layer, amounts in self.relevance.items():
            td.set(("nodes", layer), amounts)
        for (later, earlier), amounts in self.edges.items():
            td.set(("edges", later, earlier), amounts)
        for layer, amounts in self.gap.items():
            td.set(("gap", layer), amounts)
        return td

    def to_networkx(self) -> Any:
        """As a ``networkx.DiGraph``, from inputs to the target, of what is kept.

        Nodes are pairs ``(layer, unit)`` with an attribute ``relevance``, and so are edges.

        Raises:
            ValueError: it is of several elements of a batch.
        """
        import networkx  # type: ignore[import-untyped]  # torch needs it too; it is slow to load

        graph = networkx.DiGraph()
        for node, amount in self.nodes().items():
            graph.add_node((node.layer, node.unit), relevance=amount, layer=node.layer)
        for (above, below), amount in self.links().items():
            graph.add_edge((below.layer, below.unit), (above.layer, above.unit), relevance=amount)
        return graph

    def _units(self, layer: str) -> list[int]:
        marks = self.kept.get(layer)
        count = self.relevance[layer].shape[-1]
        return list(range(count)) if marks is None else marks.nonzero().flatten().tolist()

    def _require_one(self) -> None:
        if self.batch:
            raise ValueError(
                f"the graph is of a batch {list(self.batch)}: choose an element, graph[0], or take graph.mean()"
            )


def attribution_graph(
    method: Attribution,
    model: nn.Module,
    td: TensorDictBase,
    layers: Mapping[str, Units | int | None],
    *,
    inputs: Mapping[NestedKey, Units | int | None] | None = None,
) -> AttributionGraph:
    """How much relevance goes from each unit of some layers to each unit of the earlier ones, and to the inputs.

    For each layer, all of its units are pulled back at once, as many as the memory budget of the method allows; where
    something goes past the layer before, once more as far as the next, until nothing does.

    Args:
        method: explains one target; with a ledger, the way of each unit's relevance to the inputs is accounted for.
        model: the model.
        td: what it is run on, ``[*batch]``.
        layers: paths of modules, ``"path:1"`` of the second call of one, in the order in which the model runs them, and
            the axis along which their units lie (:class:`~tdhook.targets.Units`, or an ``int``; ``None`` where there
            is but one).
        inputs: of attributed inputs, the axis along which their units lie; others are one unit each.

    Raises:
        ValueError: the target explains several outputs, no layer is named, or they are in another order; and what
            :class:`~tdhook.targets.Through` raises.
    """
    if not layers:
        raise ValueError("a graph has at least one layer: name paths of modules")
    paths = {path: _units(units) for path, units in layers.items()}
    asking = _Asking(
        method, model, td, paths, {_name(key): _units(units) for key, units in (inputs or {}).items()}
    )
    whole = asking.pulled(method.seeder, list(paths))
    if whole.several:
        raise ValueError(
            f"a graph is of one target, and {method.target!r} explains several: name one of them"
        )
    least = (
        max(float(x.abs().max()) for x in whole.amounts.values())
        * 64
        * torch.finfo(next(iter(whole.amounts.values())).dtype).eps
    )
    edges: dict[tuple[str, str], Tensor] = {}
    gap: dict[str, Tensor] = {}
    for place, path in enumerate(paths):
        earlier, later = list(paths)[:place], list(paths)[place + 1 :]
        if later:
            asking.require_behind(path, later, whole.amounts[path].shape[-1], least)
        target = Through(method.seeder, path, "all", paths[path].axis, paths[path].heads)
        found = asking.pulled(target, earlier)
        if found.gap is not None:
            gap[path] = found.gap
        for other in reversed(earlier):
            if float(found.amounts[other].abs().max()) <= least:
                continue
            edges[path, other] = found.amounts[other]
            units = paths[other]
            target = Through(target, other, "none", units.axis, units.heads, beside="counted")
            found = asking.pulled(target, earlier)
        for name, amounts in found.amounts.items():
            if name not in paths and float(amounts.abs().max()) > least:
                edges[path, name] = amounts
    given = tuple(name for name in whole.amounts if name not in paths)
    relevance = {name: whole.amounts[name] for name in (*given, *paths)}
    graph = AttributionGraph(relevance, edges, gap, td.batch_size, given)
    meeting = asking.meeting(whole)
    if not meeting:
        return graph
    kept_back = {path: graph.absorbed(path) for path in paths}
    shared = {path: x.mean(meeting, keepdim=True).expand_as(x) for path, x in kept_back.items()}
    return replace(graph, kept_back=shared)


@dataclass
class _Pulled:
    """What one explanation brought to layers and inputs.

    Attributes:
        amounts: by name, ``[*batch, units]``, or ``[*batch, several, units]``.
        gap: of each, ``[*batch, several]``, if there is a ledger.
        several: whether there are several explanations.
    """

    amounts: dict[str, Tensor]
    gap: Tensor | None
    several: bool


@dataclass
class _Asking:
    """Asks for the relevance of the units of layers and inputs.

    Attributes:
        method: explains.
        model: the model.
        td: what it is run on.
        layers: the units of each layer by its path.
        inputs: those of inputs by their names.
    """

    method: Attribution
    model: nn.Module
    td: TensorDictBase
    layers: Mapping[str, Units]
    inputs: Mapping[str, Units]

    def meeting(self, whole: _Pulled) -> list[int]:
        """The batch axes along which elements depend on each other.

        Where they do not, relevance of weighted elements is weighted relevance.

        Args:
            whole: what the target brings to all layers and inputs.
        """
        batch, found = self.td.batch_size, []
        for axis, count in enumerate(batch):
            if count < 2:
                continue
            weight = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.5
            weight = weight.reshape(-1, *(1,) * (len(batch) - axis - 1)).expand(batch).to(self.td.device)
            amounts = self.pulled(Weighed(self.method.seeder, weight), list(self.layers)).amounts
            if not all(
                is_close(x, beside(weight.to(x), x) * whole.amounts[name]) for name, x in amounts.items()
            ):
                found.append(axis)
        return found

    def require_behind(self, path: str, later: Sequence[str], count: int, least: float) -> None:
        """Layers that are named after one of ``count`` units are behind it: none of them has relevance of all these.

        Raises:
            ValueError: one has more than the least that counts.
        """
        units = self.layers[path]
        target = Through(self.method.seeder, path, tuple(range(count)), units.axis, units.heads)
        amounts = self.pulled(target, later).amounts
        before = [other for other in later if float(amounts[other].abs().max()) > least]
        if before:
            raise ValueError(
                f"layers are named in the order in which the model runs them, and {before[0]!r}, which comes before "
                f"{path!r}, is named after it"
            )

    def pulled(self, target: Seeder, paths: Sequence[str]) -> _Pulled:
        """The relevance of the units of some layers, and of the inputs."""
        modules = list(dict.fromkeys(map(path_of, paths)))
        method = self.method.asked(target=target, input_modules=modules, use_inputs=True, values=False)
        explained = method.wrap(self.model)
        found = explained(self.td.copy())
        amounts, several = {}, False
        batch = self.td.batch_size
        for key in explained.attributed:
            relevance, value = found.get(explained.entry(key)), self.td.get(key)
            several = relevance.dim() > value.dim()
            units = self.inputs.get(_name(key))
            if units is None:
                lead = (*batch, relevance.shape[len(batch)]) if several else batch
                amounts[_name(key)] = relevance.reshape(*lead, -1).sum(-1, keepdim=True)
            else:
                amounts[_name(key)] = _pooled(_name(key), units, relevance, batch, several)
        unknown = self.inputs.keys() - amounts.keys()
        if unknown:
            raise ValueError(
                f"inputs name {sorted(unknown)[0]!r}, which is not attributed; there are {', '.join(amounts)}"
            )
        for path in paths:
            relevance = found.get(explained.entry(written_at(path)))
            amounts[path] = _pooled(path, self.layers[path], relevance, batch, several)
        return _Pulled(amounts, found.get(("ledger", "gap"), None), several)


def _pooled(name: str, units: Units, relevance: Tensor, batch: torch.Size, several: bool) -> Tensor:
    """The relevance of each unit, ``[*batch, units]``, or ``[*batch, several, units]``."""
    lead = len(batch)
    moved = relevance.movedim(lead, 0) if several else relevance
    layer = Layer(repr(name), moved[0] if several else moved, lead, batch)
    pooled = units.pooled(moved, layer)
    return pooled.movedim(0, lead) if several else pooled


def _name(key: NestedKey) -> str:
    return ".".join(parts_of(key))


def _units(units: Units | int | None) -> Units:
    return units if isinstance(units, Units) else Units(units)
