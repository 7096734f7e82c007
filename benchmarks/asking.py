"""Methods that ask a model many times, against captum's at the same work: ``python -m benchmarks.asking``.

Both take turns in one process (:mod:`benchmarks.timing`); a figure is the median over rounds of captum's time over
ours. Where captum has a choice of how much it does at once, it is given each of several and the fastest counts. Of six
outputs, captum is called for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.models import mlp, nature_cnn
from benchmarks.timing import Contender, interleaved, ratios
from tdhook import Target
from tdhook.attribution import Averaged, Gradient, IntegratedGradients, Noise, Occlusion, ShapleySampling
from tdhook.contexts.attribution import Attribution
from tdhook.perturbing.features import patches

OUTPUTS = 6
AT_ONCE = (1, 8, 64)
"""How many changed inputs captum looks at together."""
Calls = Callable[[nn.Module], "dict[str, Callable[[Tensor, int], Tensor]]"]


@dataclass(frozen=True)
class Asking:
    """One method on one model.

    Attributes:
        name: of the method.
        model: its name.
        batch: how many inputs.
        net: the model.
        x: inputs.
        ours: the method for a target.
        theirs: what captum has, by how it is called.
    """

    name: str
    model: str
    net: nn.Module
    x: Tensor
    ours: Callable[[Target], Attribution]
    theirs: Calls


@dataclass
class Row:
    """What was measured: milliseconds, and quartiles of captum's time over ours."""

    method: str
    model: str
    batch: int
    outputs: int
    ours: float
    captum: float
    at_once: str
    faster: list[float]


def cases() -> Iterator[Asking]:
    """Each method, on the policies of vectors and of pixels, for one input and for a batch."""
    torch.manual_seed(0)
    vector, pixel = mlp(64).eval().requires_grad_(False), nature_cnn(OUTPUTS).eval().requires_grad_(False)
    squares = patches((4, 84, 84), 12).contiguous()  # captum flattens them by view
    for model, net, sizes, shape in (
        ("MLP", vector, (1, 256), (17,)),
        ("Nature CNN", pixel, (1, 32), (4, 84, 84)),
    ):
        for batch in sizes:
            x = torch.rand(batch, *shape)
            yield Asking("integrated gradients, 50 steps", model, net, x, _integrated, _captum_integrated)
            yield Asking("SmoothGrad, 50 draws", model, net, x, _smooth, _captum_smooth)
            if model == "MLP":
                groups, window, orders = None, 1, 25
            else:
                groups, window, orders = squares, (12, 12), 2
            yield Asking("occlusion", model, net, x, _occlusion(window), _captum_occlusion(shape, window))
            yield Asking(
                f"Shapley sampling, {orders} orders",
                model,
                net,
                x,
                _shapley(orders, groups),
                _captum_shapley(orders, groups),
            )


def _integrated(target: Target) -> Attribution:
    return IntegratedGradients(target, steps=50)


def _captum_integrated(net: nn.Module) -> dict[str, Callable[[Tensor, int], Tensor]]:
    from captum.attr import IntegratedGradients as Theirs

    method = Theirs(net)
    found = {"all": lambda x, i: method.attribute(x, target=i, n_steps=50)}
    found["200 rows"] = lambda x, i: method.attribute(
        x, target=i, n_steps=50, internal_batch_size=max(200, len(x))
    )
    return found


def _smooth(target: Target) -> Attribution:
    return Averaged(Gradient(target, signed=True), Noise(0.1, 50))


def _captum_smooth(net: nn.Module) -> dict[str, Callable[[Tensor, int], Tensor]]:
    from captum.attr import NoiseTunnel, Saliency

    method = NoiseTunnel(Saliency(net))

    def call(at_once: int | None) -> Callable[[Tensor, int], Tensor]:
        return lambda x, i: method.attribute(
            x, target=i, nt_samples=50, stdevs=0.1, abs=False, nt_samples_batch_size=at_once
        )

    return {"all": call(None), "8 draws": call(8)}


def _occlusion(window: int | tuple[int, int]) -> Callable[[Target], Attribution]:
    return lambda target: Occlusion(target, window=window)


def _captum_occlusion(shape: tuple[int, ...], window: int | tuple[int, int]) -> Calls:
    size = (*shape[:-2], *window) if isinstance(window, tuple) else (window,)

    def made(net: nn.Module) -> dict[str, Callable[[Tensor, int], Tensor]]:
        from captum.attr import Occlusion as Theirs

        method = Theirs(net)

        def call(at_once: int) -> Callable[[Tensor, int], Tensor]:
            return lambda x, i: method.attribute(x, size, size, target=i, perturbations_per_eval=at_once)

        return {f"{at_once}": call(at_once) for at_once in AT_ONCE}

    return made


def _shapley(orders: int, groups: Tensor | None) -> Callable[[Target], Attribution]:
    return lambda target: ShapleySampling(target, permutations=orders, features=groups)


def _captum_shapley(orders: int, groups: Tensor | None) -> Calls:
    def made(net: nn.Module) -> dict[str, Callable[[Tensor, int], Tensor]]:
        from captum.attr import ShapleyValueSampling

        method, mask = ShapleyValueSampling(net), None if groups is None else groups.unsqueeze(0)

        def call(at_once: int) -> Callable[[Tensor, int], Tensor]:
            return lambda x, i: method.attribute(
                x, target=i, n_samples=orders, feature_mask=mask, perturbations_per_eval=at_once
            )

        return {f"{at_once}": call(at_once) for at_once in AT_ONCE}

    return made


def measured(case: Asking, several: bool, seconds: float) -> Row:
    """Let ours and captum's take turns."""
    explained = case.ours(Target("output", "all" if several else 1)).wrap(case.net, in_keys=["observation"])
    each = range(OUTPUTS) if several else [1]
    theirs = {
        name: Contender(lambda td, call=call: torch.stack([call(td["observation"], i) for i in each]))
        for name, call in case.theirs(case.net).items()
    }
    ours = Contender(lambda td: explained(td)["attr", "observation"])
    td = TensorDict({"observation": case.x}, [len(case.x)])
    times = interleaved({"ours": ours, **theirs}, td, seconds, rounds=3)
    best = min(theirs, key=lambda name: sorted(times[name].wall)[len(times[name].wall) // 2])
    medians = {name: sorted(one.wall)[len(one.wall) // 2] * 1e3 for name, one in times.items()}
    return Row(
        case.name,
        case.model,
        len(case.x),
        len(each),
        medians["ours"],
        medians[best],
        best,
        ratios(times[best], times["ours"]),
    )


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | model | batch | outputs | ours, ms | captum, ms | times faster |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        low, median, high = row.faster
        lines.append(
            f"| {row.method} | {row.model} | {row.batch} | {row.outputs} | {row.ours:.2f} | {row.captum:.2f} "
            f"({row.at_once}) | **{median:.1f}** ({low:.1f} to {high:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asking", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only cases in whose name, or that of the model, all of these occur"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each case, at least")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for case in cases():
        for several in (False, True):
            if all(word in f"{case.name} {case.model} {len(case.x)}" for word in arguments.words):
                rows.append(measured(case, several, arguments.seconds))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        report = {"machine": machine("cpu"), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
