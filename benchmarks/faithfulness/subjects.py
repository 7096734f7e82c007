"""What is explained: a trained model, the inputs it meets, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from tdhook.evaluation import Baseline, Groups
from tdhook.targets import TargetLike

__all__ = ["PLAIN", "Subject"]

PLAIN: Mapping[str, Baseline] = {"zero": 0.0, "mean": "mean", "sample": "sample"}


@dataclass(frozen=True)
class Subject:
    """A trained model and how it is asked.

    Attributes:
        name: of the agent, or the model.
        what: it, where it acts, and what is explained, in words.
        kind: ``"vector"``, ``"sequence"`` or ``"pixels"``.
        model: reads ``keys`` and writes what is explained.
        target: what is explained.
        draw: of a seed, inputs ``[rows]`` as the model meets them; and under ``"truth"``, where it is known what they
            are answered by, masks of it.
        keys: what gets relevance.
        presets: those that are tried without a reference, and with one.
        groups: entries that are one feature.
        baselines: what explanations compare with, by name.
        judges: what features are replaced by when explanations are judged; by default the same.
        steps: of the curves.
        permutations: of the Shapley values, where there are too many features for all coalitions.
        paths: how many gradients integrated gradients take.
        seeds: how many times inputs, and what else is random, are drawn.
        judged: whether occlusion and Shapley values are computed.
    """

    name: str
    what: str
    kind: str
    model: TensorDictModuleBase
    target: TargetLike
    draw: Callable[[int], TensorDictBase]
    keys: tuple[NestedKey, ...] = ("observation",)
    presets: tuple[str, ...] = ("epsilon", "gamma")
    groups: Groups = None
    baselines: Mapping[str, Baseline] = field(default_factory=lambda: PLAIN)
    judges: Mapping[str, Baseline] | None = None
    steps: int | None = None
    permutations: int = 64
    paths: tuple[int, ...] = (1, 3, 32)
    judged: bool = True
    seeds: int = 5

    @property
    def metrics(self) -> Mapping[str, Baseline]:
        """What features are replaced by when explanations are judged."""
        return self.baselines if self.judges is None else self.judges
