"""Fronts: the part of a tape next to some values that is one linear map, whatever the values are.

A backward pass through it can be made once, of a sum, in the place of many whose results are summed. It is found on the
tape, node by node: never by what module made a node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tdhook.tape.internals import gradients_of, is_plain, noted_by
from tdhook.tape.sparse import equal

__all__ = ["Front", "Fronts"]

_Edge: TypeAlias = "tuple[Node, int]"
_Links: TypeAlias = "list[tuple[int, _Edge]]"


@dataclass(frozen=True)
class _Linear:
    """What makes a node's backward pass a linear map that is the same for all values.

    Attributes:
        places: of the arguments, those through which what depends on the sources may come, each of them alone; ``None``
            for any, several together.
        noted: what the backward pass goes by, which is to be the same; of one argument alone, what it says of others.
    """

    places: tuple[int, ...] | None = None
    noted: tuple[tuple[str, ...], ...] = ((),)


_GRID = ("weight", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_LINEAR = {
    "ConvolutionBackward0": _Linear((0,), (_GRID,)),
    "AddmmBackward0": _Linear((1,), (("mat2", "alpha"),)),
    "MmBackward0": _Linear((0,), (("mat2",),)),
    "NativeBatchNormBackward0": _Linear((0,), (("weight", "running_var", "training", "eps"),)),
    "AvgPool2DBackward0": _Linear((0,), (_POOL,)),
    "MulBackward0": _Linear((0, 1), (("other",), ("self",))),
    "DivBackward0": _Linear((0,), (("other",),)),
    "AddBackward0": _Linear(None, (("alpha",),)),
    "SubBackward0": _Linear(None, (("alpha",),)),
    "RsubBackward1": _Linear((0,), (("alpha",),)),
    "CatBackward0": _Linear(None, (("dim",),)),
    "PermuteBackward0": _Linear((0,), (("dims",),)),
    "TransposeBackward0": _Linear((0,), (("dim0", "dim1"),)),
    "SliceBackward0": _Linear((0,), (("dim", "start", "end", "step"),)),
    "SelectBackward0": _Linear((0,), (("dim", "index"),)),
    "UnsqueezeBackward0": _Linear((0,), (("dim",),)),
    "SqueezeBackward1": _Linear((0,), (("dim",),)),
    "ConstantPadNdBackward0": _Linear((0,), (("pad",),)),
    **dict.fromkeys(
        (
            "NegBackward0",
            "CloneBackward0",
            "AliasBackward0",
            "ToCopyBackward0",
            "ViewBackward0",
            "UnsafeViewBackward0",
            "ReshapeAliasBackward0",
        ),
        _Linear((0,)),
    ),
}
# Axes that these move, or along which they put values side by side: never the first one, along which copies lie.
_MOVED = {"CatBackward0": ("dim",), "TransposeBackward0": ("dim0", "dim1")}
_FACTORS = {("MulBackward0", 0): "other", ("MulBackward0", 1): "self", ("DivBackward0", 0): "other"}
_NEGATIVE = 2**63


@dataclass
class Fronts:
    """Whether the fronts of a model are what they seem, as far as was seen.

    Attributes:
        trusted: whether what was gone through once was seen to come to what each variant comes to; ``None`` if that
            was not looked at.
    """

    trusted: bool | None = None


class Front:
    """The part of a tape between some values and where it ends to be linear.

    Attributes:
        edges: where it ends: all that goes back to the sources comes by here.
        shapes: of what comes by there.
        breadth: of its layers, how many values go into each that comes out, at most; 0 where there is no layer.
    """

    def __init__(self, nodes: list[Node], links: list[_Links], edges: list[_Edge], ends: list[_Edge]) -> None:
        self._nodes, self._links = nodes, links
        self._places = {node: number for number, node in enumerate(nodes)}
        self._ends = {edge: -1 - number for number, edge in enumerate(ends)}
        self.edges = [GradientEdge(*edge) for edge in edges]
        self.shapes = [torch.Size(gradients_of(node)[number][0]) for node, number in edges]
        self.breadth = max((_breadth(node) for node in nodes), default=0)

    @staticmethod
    def of(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> Front | None:
        """The front of the tape between some tensors and the sources that they are pulled back to.

        Returns:
            ``None`` where nothing depends on the sources, one of these on another, or a value goes on within the front
            and past it.
        """
        ends = [_edge(get_gradient_edge(x)) for x in sources]
        starts = [_edge(get_gradient_edge(z)) for z in tensors if z.grad_fn is not None]
        known = set(ends)
        depends: dict[Node, bool] = {}
        linear: dict[Node, bool] = {}
        nodes: list[Node] = []
        links: list[_Links] = []
        edges: dict[_Edge, None] = {}
        for node in _upwards([node for node, _ in starts]):
            used: _Links = [
                (place, (before, number))
                for place, (before, number) in enumerate(node.next_functions)
                if before is not None and ((before, number) in known or depends[before])
            ]
            depends[node] = bool(used)
            if not used:
                linear[node] = False
                continue
            if any(end[0] is node for end in ends):
                return None
            inside = all(edge in known or linear[edge[0]] for _, edge in used)
            linear[node] = inside and _is_linear(node, [place for place, _ in used])
            if linear[node]:
                nodes.append(node)
                links.append(used)
            else:
                edges.update((edge, None) for _, edge in used if edge in known or linear[edge[0]])
        edges.update((edge, None) for edge in starts if edge in known or linear[edge[0]])
        # What arrives where it goes on both ways would have what comes through the front in it.
        parted = any(edge in edges for used in links for _, edge in used)
        return Front(nodes, links, list(edges), ends) if edges and not parted else None

    def is_as(self, other: Front, copies: int) -> bool:
        """Whether it is the map of another one for each of so many copies, which lie one after the other."""
        if len(self._nodes) != len(other._nodes) or len(self.edges) != len(other.edges):
            return False
        pairs = zip(self.edges, other.edges, strict=True)
        if any(self._place(_edge(one)) != other._place(_edge(two)) for one, two in pairs):
            return False
        return all(
            self._link(mine) == other._link(its) and _is_same(one, two, mine[0][0], copies)
            for one, two, mine, its in zip(self._nodes, other._nodes, self._links, other._links, strict=True)
        )

    def _link(self, links: _Links) -> list[tuple[int, int, int]]:
        """Where the arguments of a node come from, by number."""
        return [(place, *self._place(edge)) for place, edge in links]

    def _place(self, edge: _Edge) -> tuple[int, int]:
        """A node by its number, and which of its values it is; a source by a negative one."""
        end = self._ends.get(edge)
        return (self._places[edge[0]], edge[1]) if end is None else (end, 0)


def _edge(edge: GradientEdge) -> _Edge:
    return edge.node, edge.output_nr


def _upwards(starts: Sequence[Node]) -> Iterator[Node]:
    """The nodes of a tape, each after all that it comes from."""
    seen: set[Node] = set()
    ahead: list[tuple[Node, bool]] = [(node, False) for node in reversed(starts)]
    while ahead:
        node, done = ahead.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            ahead.append((node, True))
            ahead += [
                (before, False)
                for before, _ in reversed(node.next_functions)
                if before is not None and before not in seen
            ]


def _breadth(node: Node) -> int:
    name = node.name()
    try:
        if name == "ConvolutionBackward0":
            return math.prod(noted_by(node, "weight").shape[1:])
        return int(noted_by(node, "mat2").shape[0]) if name in ("AddmmBackward0", "MmBackward0") else 0
    except RuntimeError:  # it was overwritten, which a backward pass says better
        return 0


def _is_linear(node: Node, places: Sequence[int]) -> bool:
    known = _LINEAR.get(node.name())
    if known is None:
        return False
    if known.places is None:
        return True
    if len(places) > 1 or places[0] not in known.places:
        return False
    if node.name() == "NativeBatchNormBackward0":
        return not noted_by(node, "training")
    factor = _FACTORS.get((node.name(), places[0]))
    return factor is None or _is_of_all(node, factor)


def _is_of_all(node: Node, factor: str) -> bool:
    """Whether a factor has no axis of the batch."""
    try:
        other = noted_by(node, factor)
    except RuntimeError:  # likewise
        return False
    (shape, _), *_ = gradients_of(node)
    return not isinstance(other, Tensor) or other.dim() < len(shape) or other.shape[0] == 1


def _is_same(node: Node, other: Node, place: int, copies: int) -> bool:
    """Whether a node does the same as another one, for each of so many copies."""
    name = node.name()
    if name != other.name():
        return False
    (shape, dtype), (its, kind) = gradients_of(node)[0], gradients_of(other)[0]
    if dtype != kind or not _are_copies(tuple(shape), tuple(its), copies):
        return False
    if any(_axis(noted_by(node, axis), len(shape)) == 0 for axis in _MOVED.get(name, ())):
        return False
    if name == "PermuteBackward0" and _axis(noted_by(node, "dims")[0], len(shape)) != 0:
        return False
    known = _LINEAR[name]
    noted = known.noted[0] if known.places is None else known.noted[known.places.index(place)]
    try:
        return all(_equal(noted_by(node, what), noted_by(other, what)) for what in noted)
    except RuntimeError:  # likewise
        return False


def _are_copies(shape: tuple[int, ...], one: tuple[int, ...], copies: int) -> bool:
    if shape == (copies, *one):
        return True
    return bool(one) and shape == (copies * one[0], *one[1:])


def _axis(number: int, dims: int) -> int:
    """An axis counted from the first one, where torch noted it as a number without a sign."""
    number = number - 2 * _NEGATIVE if number >= _NEGATIVE else number
    return number + dims if number < 0 else number


def _equal(one: Any, other: Any) -> bool:
    """Whether what two nodes have noted is the same, tensors by their values."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if not (is_plain(one) and is_plain(other)):
        return equal(one, other)
    if one.numel() and 0 in (one.untyped_storage().size(), other.untyped_storage().size()):
        return False  # a sharded parameter, which is elsewhere
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return same or torch.equal(one, other)
