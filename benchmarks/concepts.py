"""Units and what they respond to, against zennit-crp at the same work: ``python -m benchmarks.concepts``.

Both take turns in one process (:mod:`benchmarks.timing`); a figure is the median over rounds of zennit-crp's time over
ours. Where it has a choice of how many conditions or rows it looks at together, it is given each of several and the
fastest counts. Of a data set, both find the steps of the most relevance, those of the largest values, and both by
class.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.library_models import import_torchvision, vgg11
from benchmarks.machine import machine
from benchmarks.models import nature_cnn
from benchmarks.timing import Contender, interleaved, ratios
from tdhook import LRP, Target
from tdhook.concepts import ReferenceSamples
from tdhook.targets import Through

PRESET = "epsilon_plus"
CONCEPTS, STEPS = 64, 1000
AT_ONCE = (8, 16, 64)
"""How many conditions zennit-crp looks at together."""
BATCHES = (32, 100, 250)
"""How many rows of a data set it looks at together."""


@dataclass(frozen=True)
class Case:
    """A layer of a model.

    Attributes:
        model: its name.
        net: the model, in evaluation mode.
        layer: the path of a layer with 64 channels or more.
        shape: of an input.
    """

    model: str
    net: nn.Module
    layer: str
    shape: tuple[int, ...]


@dataclass
class Row:
    """What was measured: milliseconds, and quartiles of zennit-crp's time over ours."""

    work: str
    model: str
    layer: str
    ours: float
    zennit_crp: float
    at_once: str
    faster: list[float]


def cases() -> Iterator[Case]:
    """Layers of the network of Atari agents, and of VGG-11."""
    torch.manual_seed(0)
    yield Case("Nature CNN", nature_cnn(6).eval().requires_grad_(False), "4", (4, 84, 84))
    yield Case("VGG-11", vgg11().eval().requires_grad_(False), "features.3", (3, 64, 64))


def concepts_of_one_input(case: Case) -> tuple[TensorDict, Contender, dict[str, Contender]]:
    """The relevance of the input that passes each of 64 units."""
    from crp.attribution import CondAttribution
    from zennit.composites import EpsilonPlus

    units = list(range(CONCEPTS))
    target = Through(Target("output", 1), case.layer, units, axis=1)
    explained = LRP(PRESET, target=target).wrap(case.net, in_keys=["observation"])
    conditions = [{case.layer: [unit], "y": [1]} for unit in units]
    attribution = CondAttribution(case.net)

    def theirs(at_once: int | None) -> Callable[[TensorDict], Tensor]:
        def call(td: TensorDict) -> Tensor:
            x = td["observation"].requires_grad_()
            if at_once is None:
                return attribution(x, conditions, EpsilonPlus()).heatmap
            parts = attribution.generate(x, conditions, EpsilonPlus(), batch_size=at_once, verbose=False)
            return torch.cat([part.heatmap.clone() for part in parts])

        return call

    contenders = {"all": Contender(theirs(None)), **{str(n): Contender(theirs(n)) for n in AT_ONCE}}
    td = TensorDict({"observation": torch.rand(1, *case.shape)}, [1])
    return td, Contender(lambda td: explained(td)["attr", "observation"]), contenders


class Pictures:
    """A data set as zennit-crp reads it."""

    def __init__(self, td: TensorDict) -> None:
        self.x, self.classes = td["observation"], td["class"].tolist()

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.classes[index]


def samples_of_a_data_set(case: Case) -> tuple[TensorDict, Contender, dict[str, Contender]]:
    """The steps that each unit responds to, by relevance and by value, over all of a thousand and by class."""
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.visualization import FeatureVisualization
    from zennit.composites import EpsilonPlus

    method = LRP(PRESET, target=Target("output", ("class",)))

    def ours(td: TensorDict) -> Tensor:
        found = []
        for by in ("relevance", "value"):
            samples = ReferenceSamples(method, case.layer, axis=1, by=by, groups="class")  # type: ignore[arg-type]
            found.append(samples.fold(case.net, td, in_keys=["observation"]).found.best(0)["amount"])
        return torch.stack(found)

    def theirs(batch: int) -> Callable[[TensorDict], Tensor]:
        def call(td: TensorDict) -> Tensor:
            layers: dict[str, Any] = {case.layer: ChannelConcept()}
            quiet = io.StringIO()
            with (
                tempfile.TemporaryDirectory() as folder,
                contextlib.redirect_stdout(quiet),
                contextlib.redirect_stderr(quiet),
            ):
                seen = FeatureVisualization(CondAttribution(case.net), Pictures(td), layers, path=folder)
                seen.run(EpsilonPlus(), 0, len(td), batch)
            return torch.zeros(())

        return call

    td = TensorDict(
        {"observation": torch.rand(STEPS, *case.shape), "class": torch.arange(STEPS) % 6}, [STEPS]
    )
    return td, Contender(ours), {str(n): Contender(theirs(n)) for n in BATCHES}


WORK = {
    f"{CONCEPTS} concepts of one input": concepts_of_one_input,
    f"a data set of {STEPS}": samples_of_a_data_set,
}


def measured(name: str, case: Case, seconds: float) -> Row:
    """Let ours and theirs take turns."""
    td, ours, theirs = WORK[name](case)
    times = interleaved({"ours": ours, **theirs}, td, seconds, rounds=3)
    medians = {key: sorted(one.wall)[len(one.wall) // 2] * 1e3 for key, one in times.items()}
    best = min(theirs, key=lambda key: medians[key])
    faster = ratios(times[best], times["ours"])
    return Row(name, case.model, case.layer, medians["ours"], medians[best], best, faster)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| work | model | layer | ours, ms | zennit-crp, ms | times faster |", "| --- " * 6 + "|"]
    for row in rows:
        low, median, high = row.faster
        lines.append(
            f"| {row.work} | {row.model} | `{row.layer}` | {row.ours:.1f} | {row.zennit_crp:.1f} ({row.at_once}) | "
            f"**{median:.1f}** ({low:.1f} to {high:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.concepts", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only work in whose name, or that of the model, all of these occur"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each case, at least")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import_torchvision()
    rows = []
    for case in cases():
        for name in WORK:
            if all(word in f"{name} {case.model}" for word in arguments.words):
                rows.append(measured(name, case, arguments.seconds))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        report = {
            "machine": machine("cpu"),
            "threads": arguments.threads,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
