"""BiLRP: which pairs of features make two embeddings similar."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from tdhook.attribution.around import require_values_alone
from tdhook.contexts.attribution import Attribution
from tdhook.keys import under
from tdhook.models.model import Model
from tdhook.passes.forward import Run
from tdhook.passes.meeting import joint_axes
from tdhook.passes.rows import is_close
from tdhook.passes.runner import Runner
from tdhook.tape.axes import beside
from tdhook.tape.conditions import holds
from tdhook.targets import Target, TargetLike
from tdhook.targets.base import Seeder
from tdhook.targets.computed import Derived
from tdhook.targets.outputs import Index, output_of
from tdhook.targets.weighed import Weighed

__all__ = ["BiLRP"]

PAIRS = "pairs"
# Bytes that the relevance of several dimensions of the embeddings may take together.
_BUDGET = {"cpu": 2**27}
_BUDGET_ELSEWHERE = 2**31
# Bytes that a matrix of pairs may take.
_MOST = 2**34


@dataclass(frozen=True, eq=False)
class Similarity(Derived):
    """The similarity of two embeddings, written under ``key``.

    Args:
        first: the key of one embedding, and ``second``: that of the other one, ``[*batch, dimensions]`` each.
        cosine: whether it is that of the angle between them, and not the scalar product.
        key: where it is written.
    """

    first: NestedKey
    second: NestedKey
    cosine: bool = False
    key: NestedKey = "similarity"
    index: Index = None

    @property
    def explains(self) -> list[NestedKey]:
        """The embeddings."""
        return [self.first, self.second]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The scalar product, or the cosine.

        Raises:
            ValueError: they are no vectors of one length.
        """
        one, other = (output_of(outputs, key) for key in (self.first, self.second))
        for key, z in ((self.first, one), (self.second, other)):
            if z.dim() != outputs.batch_dims + 1 or z.shape != one.shape:
                raise ValueError(
                    f"{key!r} is of shape {list(z.shape)}, and a pair of embeddings is of two vectors of one length, "
                    f"{[*outputs.batch_size, 'dimensions']}"
                )
        return F.cosine_similarity(one, other, dim=-1) if self.cosine else (one * other).sum(-1)


class BiLRP(Attribution):
    """Relevance of pairs of features, one of each input, for the similarity of two embeddings (Eberle et al. 2020).

    Of ``y = sum_m z_m z'_m``, the pair of feature ``i`` of the one input and ``j`` of the other has
    ``R_ij = sum_m R_i(z_m) R_j(z'_m)``, where ``R_i(z_m)`` is the relevance of ``i`` for dimension ``m`` by any method:
    LRP, as in the paper, or gradient times input, by which it is the product with the Hessian of ``y``.

    Pairs are written under ``("pairs", *key, *other key)``, ``[*batch, *features, *other features]``, for each input
    (or layer, ``input_modules``) that the first embedding depends on, and each that the second one does. Their sum is
    the similarity, which is written too, up to what the method absorbs. Relevance of a feature, under
    ``("attr", key)`` as with every method, is half of that of all pairs that it is in.

    Args:
        method: explains each dimension of the embeddings; what is attributed is what it says.
        first: the key of one embedding, ``[*batch, dimensions]``.
        second: that of the other one; by default the same, so that pairs are of features of one input.
        similarity: ``"dot"``, the scalar product, or ``"cosine"``, whose norms are held constant.
        summed: axes of the features that pairs are summed over, ``-1`` for one value for each token of an embedding.
            The whole batch counts as one leading axis, and negative ones count from the end.
        key: where the similarity is written.

    Raises:
        TypeError: the method compares with a reference.
        ValueError: the method writes more than relevance; an axis is the batch's; when it is called: elements of the
            batch depend on each other.
    """

    def __init__(
        self,
        method: Attribution,
        first: NestedKey,
        second: NestedKey | None = None,
        *,
        similarity: Literal["dot", "cosine"] = "dot",
        summed: int | Sequence[int] = (),
        key: NestedKey = "similarity",
    ) -> None:
        require_values_alone(method, "similarities are explained by", "pairs have")
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity is 'dot' or 'cosine', got {similarity!r}")
        self.first: NestedKey = unravel_key(first)
        self.second: NestedKey = self.first if second is None else unravel_key(second)
        self.similarity, self.summed = similarity, (summed,) if isinstance(summed, int) else tuple(summed)
        if 0 in self.summed:
            raise ValueError(
                "summed=0 is the axis of the batch: the first axis of the features is 1, the last is -1"
            )
        self.method, self.key = method, unravel_key(key)
        asked = Similarity(self.first, self.second, similarity == "cosine", self.key)
        super().__init__(**{**method.shared, "target": asked})

    def __repr__(self) -> str:
        return f"BiLRP({self.method!r}, {self.first!r}, {self.second!r})"

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass to look, then what the method does for each dimension, as many at once as fit."""
        with runner.forward(td) as run:
            sources = run.sources()
            one, other = (output_of(run.outputs, key) for key in (self.first, self.second))
            sides = _behind(one, sources), _behind(other, sources)
            seeds = run.seeds(self.seeder)
            meeting = joint_axes(run, seeds, sources) if seeds.tensors[0].requires_grad else ()
        if meeting and self._mixes(runner, td, run, sources):
            raise ValueError(
                f"elements of the batch {list(td.batch_size)} depend on each other along its axis {meeting[0]}, so "
                "that a similarity is one of features of several elements, and no pair is of one: explain elements "
                "one by one, or call eval() on a model that normalises over the batch"
            )
        sums = _Sums(run, sources, self.summed)
        dimensions, size = one.shape[-1], self._at_once(runner, sources)
        for start in range(0, dimensions, size):
            index = list(range(start, min(start + size, dimensions)))
            found = self._found(runner, td, Target(self.first, index))
            twin = found if self.second == self.first else self._found(runner, td, Target(self.second, index))
            sums.add({key: found[key] for key in sides[0]}, {key: twin[key] for key in sides[1]})
        (scale,) = seeds.grads
        if self.similarity == "cosine":
            scale = scale / (one.detach().norm(dim=-1) * other.detach().norm(dim=-1)).clamp(min=1e-8)
        runner.beside.update(sums.of_pairs(scale))
        return sums.of_features(scale)

    def _found(self, runner: Runner, td: TensorDictBase, target: Seeder) -> Mapping[NestedKey, Tensor]:
        """Relevance for dimensions of an embedding, ``[dimensions, *source]`` by source."""
        with runner.from_the_start():
            return self.method.explaining(target).explain(runner.on(td, target), td)

    def _mixes(
        self, runner: Runner, td: TensorDictBase, run: Run, sources: Mapping[NestedKey, Tensor]
    ) -> bool:
        """Whether the method gives an element relevance for the embeddings of others; rules may hold these constant."""
        weight = torch.rand(td.batch_size.numel(), generator=torch.Generator().manual_seed(0)) + 0.5
        weight = weight.reshape(td.batch_size).to(td.device)
        for embedding in {self.first, self.second}:
            target = Target(embedding, [0])
            plain = self._found(runner, td, target)
            for key, x in self._found(runner, td, Weighed(target, weight)).items():
                one, all_ = (run.in_batch_shape(key, r[0], sources[key]) for r in (x, plain[key]))
                if not holds(is_close(one, beside(weight.to(all_), all_) * all_)):
                    return True
        return False

    def _at_once(self, runner: Runner, sources: Mapping[NestedKey, Tensor]) -> int:
        """How many dimensions fit into the budget."""
        each = 2 * sum(x.numel() * x.element_size() for x in sources.values())
        budget, kinds = self.memory_budget, {x.device.type for x in sources.values()}
        if budget is None:
            budget = min((_BUDGET.get(kind, _BUDGET_ELSEWHERE) for kind in kinds), default=0)
        return max(1, budget // max(1, each))

    def start(self, model: Model) -> Any:
        """What the method works out."""
        return self.method.start(model)

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"pairs"``."""
        return (PAIRS,)

    @property
    def changes_inputs(self) -> bool:
        """Whether the method does."""
        return self.method.changes_inputs

    def asked(self, **shared: Any) -> BiLRP:
        """The same, with other options of those that all methods take; the similarity is what stays explained."""
        made = copy.copy(self)
        made.method = self.method.asked(**{**shared, "target": self.method.target})
        Attribution.__init__(made, **{**made.method.shared, "target": shared.get("target", self.target)})
        return made

    def explaining(self, target: TargetLike) -> BiLRP:
        """The same for another target, which says when the similarity is explained.

        Raises:
            TypeError: it explains something else.
        """
        other = super().explaining(target)
        if list(other.seeder.explains or ()) != [self.first, self.second]:
            raise TypeError(
                f"{self!r} explains a similarity, and no {target!r}: name the embeddings, first and second"
            )
        return other

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What the method reads."""
        return self.method.reads(td)

    def reads_signs(self, state: Any) -> bool:
        """Whether the method does."""
        return self.method.reads_signs(state)

    def looks_across(self, state: Any) -> bool:
        """Whether the method does."""
        return self.method.looks_across(state)

    def learnt(self, state: Any) -> str:
        """What the method has seen."""
        return self.method.learnt(state)


class _Sums:
    """Sums over dimensions.

    Args:
        run: the run on the batch as it is.
        sources: the values that are attributed.
        summed: axes that pairs are summed over.
    """

    def __init__(self, run: Run, sources: Mapping[NestedKey, Tensor], summed: Sequence[int]) -> None:
        self._batch, self._sources, self._summed = run.td.batch_size, sources, summed
        leads = run.batch_dims(sources)
        self._features = {key: x.shape[leads[key] :] for key, x in sources.items()}
        # Sums of hundreds of products: in single precision at least.
        self._dtype = reduce(torch.promote_types, (x.dtype for x in sources.values()), torch.float32)
        self._each: dict[NestedKey, Tensor] = {}
        self._pairs: dict[tuple[NestedKey, NestedKey], Tensor] = {}

    def add(self, one: Mapping[NestedKey, Tensor], other: Mapping[NestedKey, Tensor]) -> None:
        """Add some dimensions: relevance ``[dimensions, *source]`` of each side."""
        sides = [
            {
                key: x.to(self._dtype).reshape(len(x), self._batch.numel(), *self._features[key])
                for key, x in side.items()
            }
            for side in (one, other)
        ]
        totals = [sum((_flat(x).sum(2) for x in side.values()), torch.zeros(())) for side in sides]
        for side, total in zip(sides, reversed(totals), strict=True):
            for key, x in side.items():
                # Half of each pair is that of either feature.
                share = torch.einsum("mb,mbi->bi", total / 2, _flat(x))
                self._each[key] = self._each[key] + share if key in self._each else share
        less = [{key: _flat(self._less(key, x)) for key, x in side.items()} for side in sides]
        for a, x in less[0].items():
            for b, y in less[1].items():
                self._require_room(a, b, x.shape[2] * y.shape[2] * x.shape[1] * x.element_size())
                made = torch.einsum("mbi,mbj->bij", x, y)
                self._pairs[a, b] = self._pairs[a, b] + made if (a, b) in self._pairs else made

    def of_pairs(self, scale: Tensor) -> dict[NestedKey, Tensor]:
        """Relevance of pairs by where it is written, each element times its scale, ``[*batch]``."""
        found: dict[NestedKey, Tensor] = {}
        for (a, b), matrix in self._pairs.items():
            shape = (*self._less_of(a), *self._less_of(b))
            found[under(PAIRS, a, b)] = _times(matrix, scale).reshape((*self._batch, *shape))
        return found

    def of_features(self, scale: Tensor) -> dict[NestedKey, Tensor]:
        """Relevance by source, of its shape."""
        shaped = {key: _times(x, scale).reshape(self._sources[key].shape) for key, x in self._each.items()}
        return {key: x.to(self._sources[key].dtype) for key, x in shaped.items()}

    def _axes(self, key: NestedKey) -> list[int]:
        """The axes that are summed over, counted from the end."""
        features, axes = self._features[key], set()
        for axis in self._summed:
            if not -len(features) <= axis <= len(features):
                raise ValueError(
                    f"summed={axis} is no axis of {key!r}, whose features are of shape {list(features)}"
                )
            axes.add(axis if axis < 0 else axis - 1 - len(features))
        return sorted(axes)

    def _less(self, key: NestedKey, x: Tensor) -> Tensor:
        """``[dimensions, batch, *features]`` without these."""
        axes = self._axes(key)
        return x.sum(axes) if axes else x

    def _less_of(self, key: NestedKey) -> list[int]:
        """The shape of features without these."""
        features, axes = self._features[key], self._axes(key)
        return [size for i, size in enumerate(features) if i - len(features) not in axes]

    def _require_room(self, a: NestedKey, b: NestedKey, size: int) -> None:
        if size > _MOST:
            raise ValueError(
                f"pairs of {a!r} and {b!r} would take {size / 2**30:.0f} GiB: sum over axes of the features by "
                "summed=, explain a layer by input_modules, or fewer elements at once"
            )


def _flat(x: Tensor) -> Tensor:
    """``[dimensions, batch, *features]`` with one axis of features."""
    return x.reshape(*x.shape[:2], -1)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """``[batch, ...]``, each element times its scale."""
    return x * scale.reshape(-1, *(1,) * (x.dim() - 1))


def _behind(z: Tensor, sources: Mapping[NestedKey, Tensor]) -> list[NestedKey]:
    """The sources that a value depends on."""
    nodes = {get_gradient_edge(x).node: key for key, x in sources.items()}
    found: list[NestedKey] = []
    ahead: list[Node | None] = [z.grad_fn]
    seen: set[Node | None] = {None}
    while ahead:
        node = ahead.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        if node in nodes:
            found.append(nodes[node])
        ahead += [before for before, _ in node.next_functions]
    return [key for key in sources if key in found]
