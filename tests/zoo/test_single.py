"""Models of the transformers library in single precision: relevance is as exact as the model allows.

At most 1e-5 of the relevance that double precision finds, of the worst sample and in both flows. Tiny models with
random weights are at times ill-conditioned. So, as the sweep over all models judges, more is forgiven to a model whose
relevance rounding moves as far whatever computes it: within ten times of what happens in double precision where weights
and inputs are moved by no more than single precision rounds them, or to plain gradient times input in single precision.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Attribution, GradientTimesInput

from .transformers_models import CASES, MARKS, ready

sys.path.insert(0, str(Path(__file__).parents[2]))  # where `benchmarks` is that of this repository

from benchmarks.supported.measuring import DRAWS, ROUNDING, difference, in_precision
from benchmarks.supported.status import worse

pytestmark = MARKS

Made = tuple[nn.Module, TensorDict, dict[str, Any]]
EXACT = {
    # Where a batch norm stands behind a sum or behind moved values: it had been far off.
    ("attn_lrp", "VanForImageClassification"),
    ("attn_lrp", "LevitForImageClassification"),
    ("attn_lrp", "SwiftFormerForImageClassification"),
}


def explain(made: Made, top: Tensor, dtype: torch.dtype, method: Callable[..., Attribution]) -> Tensor:
    """The relevance of each sample, in double precision whatever it was computed in."""
    module, td, attributed = made
    paths = attributed["input_modules"]
    with in_precision(dtype):
        explaining = method(target=Target("answer", top), use_inputs=not paths, input_modules=paths)
        with explaining.prepare(module, in_keys=attributed["in_keys"]) as run:
            relevance = run(td.copy())["attr"]
    values = [value if td.batch_size else value.transpose(0, 1) for value in relevance.values(True, True)]
    flat = torch.cat([value.flatten(1).double() for value in values], 1)
    return flat[(flat != 0).any(1)]  # of two texts, one alone may be of use to what is explained


def changed(made: Made, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Made:
    """A copy in a precision, its parameters and inputs changed."""
    module, td, attributed = made
    module = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(change(parameter))
    return module, td.apply(lambda x: change(x.to(dtype)) if x.is_floating_point() else x), attributed


def conditioning(made: Made, double: Made, top: Tensor, preset: str, expected: Tensor, error: float) -> float:
    """How far rounding moves relevance, or more than that, as soon as it is enough to explain the error."""
    found = 0.0
    for seed in range(DRAWS):
        lots = torch.Generator().manual_seed(seed)

        def moved(x: Tensor, lots: torch.Generator = lots) -> Tensor:
            return x * (1 + ROUNDING * (2 * torch.randint(0, 2, x.shape, generator=lots) - 1))

        nearby = changed(double, moved, torch.float64)
        found = max(found, difference(explain(nearby, top, torch.float64, lrp(preset, "gradient")), expected))
        if not worse({"float32": error, "conditioning": found}, "float32"):
            return found
    low = explain(made, top, torch.float32, GradientTimesInput)
    return max(found, difference(low, explain(double, top, torch.float64, GradientTimesInput)))


def lrp(preset: str, flow: str) -> Callable[..., Attribution]:
    def method(**options: Any) -> Attribution:
        return LRP(preset, flow=flow, on_unmatched="ignore", **options)

    return method


@pytest.mark.parametrize("preset", ["attn_lrp", "epsilon_plus"])
@pytest.mark.parametrize("name", CASES)
def test_single_precision_is_as_exact_as_the_model_allows(name: str, preset: str) -> None:
    torch.manual_seed(0)
    made = ready(CASES[name])
    with torch.no_grad():
        top = made[0](made[1].copy())["answer"].argmax(-1)
    double = changed(made, lambda x: x, torch.float64)
    for flow in ("gradient", "relevance"):
        low = explain(made, top, torch.float32, lrp(preset, flow))
        expected = explain(double, top, torch.float64, lrp(preset, flow))
        assert low.shape == expected.shape
        row = {"float32": difference(low, expected)}
        if worse(row, "float32") and (preset, name) not in EXACT:
            row["conditioning"] = conditioning(made, double, top, preset, expected, row["float32"])
        assert not worse(row, "float32"), f"{flow}: {row}"
