"""Features as players of a game: what they are worth together, one by one, and by Shapley's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.passes.questions import Asked
from tdhook.perturbing.features import Features

__all__ = ["EXACT", "EXACT_OF_SEVERAL", "Game", "all_coalitions", "occlusions", "permutations"]

EXACT, EXACT_OF_SEVERAL = 12, 8
"""Up to so many features all coalitions are played, against one reference and against several."""


@dataclass(frozen=True)
class Game:
    """A model asked about rows of which some features are there, and the others are those of a reference.

    Attributes:
        question: what is asked.
        rows: the inputs, ``[rows]``.
        features: the players.
        at_once: how many inputs the model sees at once.
    """

    question: Asked
    rows: TensorDictBase
    features: Features
    at_once: int = 8192

    def values(self, there: Tensor, reference: Mapping[NestedKey, Tensor]) -> Tensor:
        """What each coalition is worth, ``[coalitions, rows]``.

        Args:
            there: which features are those of the input, ``[coalitions, features]``.
            reference: the others, ``[rows, *shape]`` by key.
        """
        small, count, found = self.question.reads(self.rows), len(self.rows), []
        for some in there.split(max(1, self.at_once // count)):
            gone = (~some).repeat_interleave(count, 0)
            inputs = small.expand(len(some), *small.batch_size).reshape(-1)
            other = {key: x.expand(len(some), *x.shape).flatten(0, 1) for key, x in reference.items()}
            changed = self.features.replaced(inputs, other, gone)
            values = self.question.values(self.question.outputs(changed), changed)
            found.append(values.reshape(len(some), count))
        return torch.cat(found)

    def shares(
        self, coalitions: Sequence[tuple[Tensor, Tensor]], references: Sequence[Mapping[NestedKey, Tensor]]
    ) -> Tensor:
        """Weighted sums of what coalitions are worth, ``[rows, features]``, the mean over references.

        Args:
            coalitions: for each reference ``[coalitions, features]``, which are there, and the weights, of the same
                shape.
            references: ``[rows, *shape]`` by key.
        """
        total = torch.zeros(len(self.rows), self.features.count, dtype=torch.float64)
        for (there, weight), reference in zip(coalitions, references, strict=True):
            total += self.values(there, reference).T @ weight / len(references)
        return total

    def as_relevance(self, shares: Tensor) -> dict[NestedKey, Tensor]:
        """Shares of features, ``[rows, features]``, spread evenly over their entries."""
        each = torch.nn.functional.pad(shares / self.features.extent, (0, 1))[:, self.features.groups]
        parts = each.split(self.features.sizes, 1)
        return {
            key: part.reshape(self.rows.get(key).shape).to(self.rows.get(key))
            for key, part in zip(self.features.keys, parts, strict=True)
        }


def all_coalitions(count: int) -> tuple[Tensor, Tensor]:
    """Every coalition, and its weight in the Shapley value of each feature (Shapley 1953): exact."""
    there = (torch.arange(2**count).unsqueeze(-1) >> torch.arange(count)) % 2 == 1
    size = there.sum(-1, keepdim=True).double()
    # A coalition with the feature counts by (s - 1)! (n - s)! / n!, one without it by -s! (n - s - 1)! / n!.
    others = torch.where(there, size - 1, size)
    weight = (
        torch.lgamma(others + 1) + torch.lgamma(count - others) - torch.lgamma(size.new_tensor(count + 1))
    ).exp()
    return there, torch.where(there, weight, -weight)


def permutations(count: int, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coalitions that grow in random orders, each of them forth and back (Castro et al. 2009; antithetic)."""
    orders = torch.rand(-(-draws // 2), count, generator=generator).argsort(-1)
    orders = torch.cat([orders, orders.flip(-1)])[:draws]
    place = orders.argsort(-1)
    there = place.unsqueeze(1) < torch.arange(count + 1).reshape(1, -1, 1)  # [draws, count + 1, features]
    weight = torch.zeros(there.shape, dtype=torch.float64)
    joins = (place + 1).unsqueeze(1)
    weight.scatter_(1, joins, 1.0 / draws)
    weight.scatter_(1, joins - 1, -1.0 / draws)
    return there.flatten(0, 1), weight.flatten(0, 1)


def occlusions(count: int) -> tuple[Tensor, Tensor]:
    """All features, and all but one: what each is worth last."""
    there = torch.cat([torch.ones(1, count, dtype=torch.bool), ~torch.eye(count, dtype=torch.bool)])
    weight = torch.cat([torch.ones(1, count), -torch.eye(count)]).double()
    return there, weight
