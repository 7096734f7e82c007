"""Whether the units that relevance names carry decisions: they are set to their means, and the agent acts again.

``python -m benchmarks.units`` prints, for trained agents and one layer of each, in which share of observations another
action is chosen when so many units are silenced, those that each of several measures names first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from benchmarks.faithfulness.agents import AGENTS
from benchmarks.faithfulness.subjects import Subject
from tdhook import LRP
from tdhook.attribution import Attribution, Gradient
from tdhook.targets import Units
from tdhook.targets.units import Layer

__all__ = ["PLACES", "Place", "changed", "named"]

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Place:
    """A layer of an agent.

    Attributes:
        agent: its name.
        path: of the layer.
        axis: along which its units lie.
        scores: the key of the scores of the actions.
    """

    agent: str
    path: str
    axis: int = -1
    scores: NestedKey = "action_value"


# The policy of Freeway is not among them: it walks whatever eight units say.
PLACES = (
    Place("demo", "module.0.module.1"),
    Place("demo", "module.0.module.3"),
    Place("dqn", "module.0.module.1"),
    Place("dqn", "module.0.module.3"),
    Place("dueling", "module.0.module.features.3"),
    Place("ppo", "module.0.module.1", scores="logits"),
    Place("ppo", "module.0.module.3", scores="logits"),
    Place("minatar_breakout", "module.0.module.0.1", 1, "logits"),
    Place("minatar_breakout", "module.0.module.1.1", scores="logits"),
)


def measures(subject: Subject, rows: TensorDictBase, place: Place) -> dict[str, Tensor]:
    """How much each measure makes of each unit, ``[rows, units]``."""
    target = subject.target
    methods: Mapping[str, Attribution] = {
        "deeplift, from the mean": LRP("deeplift", target=target, baseline="mean"),
        "deeplift, from 16 samples": LRP("deeplift", target=target, baseline="sample", samples=16),
        "epsilon": LRP("epsilon", target=target),
        "gradient": Gradient(target, signed=True),
    }
    found: dict[str, Tensor] = {}
    value = None
    for name, method in methods.items():
        asked = method.asked(input_modules=[place.path], values=[place.path], use_inputs=True)
        explained = asked.wrap(subject.model)(rows.clone())
        attributed = explained.get(("attr", place.path))
        value = explained.get(("value", place.path))
        layer = Layer(place.path, value, 1, rows.batch_size)
        units = Units(place.axis)
        found[name] = units.pooled(attributed.abs() if name == "gradient" else attributed, layer)
        if name == "gradient":
            rise = value - value.mean(0, keepdim=True)
            found["gradient times rise"] = units.pooled(attributed * rise, layer)
    assert value is not None
    found["activation"] = units.pooled(value, layer)
    found["rise of activation"] = units.pooled((value - value.mean(0, keepdim=True)).abs(), layer)
    drawn = torch.rand(found["activation"].shape, generator=torch.Generator().manual_seed(0))
    found["chance"] = drawn
    return found


def named(amounts: Tensor, count: int) -> Tensor:
    """The units of the largest amounts, ``[rows, units]`` truth values."""
    return torch.zeros_like(amounts, dtype=torch.bool).scatter_(-1, amounts.topk(count, -1).indices, True)


def changed(model: TensorDictModuleBase, rows: TensorDictBase, place: Place, marks: Tensor) -> float:
    """The share of rows in which another action has the highest score once units are set to their means.

    Args:
        model: an agent.
        rows: what it sees, ``[rows]``.
        place: the layer.
        marks: which units, ``[rows, units]``.
    """

    def silence(module: nn.Module, args: object, output: Tensor) -> Tensor:
        layer = Layer(place.path, output, 1, rows.batch_size)
        return torch.where(Units(place.axis).spread(marks, layer), output.mean(0, keepdim=True), output)

    module = model.get_submodule(place.path)
    with torch.no_grad():
        before = model(rows.clone())[place.scores].argmax(-1)
        handle = module.register_forward_hook(silence)
        try:
            after = model(rows.clone())[place.scores].argmax(-1)
        finally:
            handle.remove()
    return float((before != after).double().mean())


def rows_of(subject: Subject, seeds: Sequence[int]) -> TensorDictBase:
    """What the agent sees, of several seeds."""
    drawn = [subject.draw(seed).select(*subject.keys) for seed in seeds]
    return torch.cat(drawn)  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.units", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of the observations")
    parser.add_argument("agents", nargs="*", help="only these")
    arguments = parser.parse_args(argv)
    totals: dict[str, list[float]] = {}
    for place in PLACES:
        if arguments.agents and place.agent not in arguments.agents:
            continue
        subject = AGENTS[place.agent]()
        rows = rows_of(subject, range(arguments.seeds))
        show(f"\n{subject.what}; {place.path}, {len(rows)} observations")
        for name, amounts in measures(subject, rows, place).items():
            counts = [count for count in COUNTS if count < amounts.shape[-1]]
            shares = [changed(subject.model, rows, place, named(amounts, count)) for count in counts]
            totals.setdefault(name, []).append(sum(shares) / len(shares))
            cells = "  ".join(f"{count}: {share:5.1%}" for count, share in zip(counts, shares, strict=True))
            show(f"  {name:26} {cells}")
    show("\nmean over layers and numbers of units")
    for name, means in sorted(totals.items(), key=lambda one: -sum(one[1])):
        show(f"  {name:26} {sum(means) / len(means):5.1%}")


if __name__ == "__main__":
    main()
