"""Relevance through units, and the samples that units respond to, equal those of zennit-crp where it has them.

A mask on the gradient at a layer leaves what goes around the layer as it is: that is ``beside="counted"`` here, and
``exclude_parallel=False`` there. With ``exclude_parallel=True`` it closes what is beside the layer, as is done here by
default.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.concepts import ReferenceSamples
from tdhook.relevance.composites.composite import preset
from tdhook.targets import Through

from .models import assert_equal
from .test_zennit import ZENNIT
from .test_zennit_residual import SUM
from .test_zennit_residual import model as residual_model

REASON = "zennit-crp is not installed; `nox -s peers` installs it"
attribution = pytest.importorskip("crp.attribution", reason=REASON)
concepts = pytest.importorskip("crp.concepts", reason=REASON)
visualization = pytest.importorskip("crp.visualization", reason=REASON)
canonizers = pytest.importorskip("zennit.torchvision", reason="zennit is not installed")

pytestmark = pytest.mark.peers

TOLERANCE = 1e-6
PRESET = "epsilon_plus_flat"
LAYERED, BLOCKS = "layers", "basic_blocks"


@functools.cache
def of_blocks() -> nn.Module:
    """A residual network whose batch norms are the identity once zennit has merged them, ``eps`` and all."""
    module = copy.deepcopy(residual_model(BLOCKS))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 0.0
    return module


@functools.cache
def of_layers() -> nn.Module:
    """A network like VGG: in-place ReLUs, max pooling, dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 32), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(32, 6),
        )  # fmt: skip
    return module.eval().requires_grad_(False).double()


MODELS = {LAYERED: of_layers, BLOCKS: of_blocks}
CANONIZERS = {LAYERED: canonizers.VGGCanonizer, BLOCKS: canonizers.ResNetCanonizer}
SIZE = 16
Conditions = list[tuple[str, Any]]
"""Layers with their units, that which is nearest to the output first."""


class Pixels(attribution.CondAttribution):
    """Theirs, with the relevance of every channel of a pixel."""

    def heatmap_modifier(self, data: Tensor, on_device: str | None = None) -> Tensor:
        return data.grad.detach()


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).clamp(-3, 3)


def composite(case: str) -> Any:
    return ZENNIT[PRESET](canonizers=[CANONIZERS[case]()])


def ours(case: str, x: Tensor, output: Any, conditions: Conditions, beside: str) -> Tensor:
    """Relevance of the input, ``[rows, ...]`` or ``[rows, units, ...]``."""
    target: Any = Target("output", output)
    for layer, units in conditions:
        target = Through(target, layer, units, axis=1, beside=beside)  # type: ignore[arg-type]
    with LRP(SUM + preset(PRESET), target=target).prepare(MODELS[case]()) as explained:
        return explained(TensorDict({"input": x}, [len(x)]))["attr", "input"]


def theirs(case: str, x: Tensor, conditions: list[dict[str, list[int]]], *, parallel: bool) -> Tensor:
    """Relevance of the input, ``[rows * conditions, ...]``."""
    module = MODELS[case]()
    found = Pixels(module)(x.clone().requires_grad_(), conditions, composite(case), exclude_parallel=parallel)
    return found.heatmap


def same(ours: Tensor, theirs: Tensor) -> None:
    """Each heatmap is the same, relative to its own size, and none where there is none."""
    some = (theirs != 0).flatten(1).any(-1)
    assert some.double().mean() >= 0.5, "nothing to compare: units have no relevance at all"
    assert_equal(ours[some], theirs[some], TOLERANCE)
    assert bool((ours[~some].abs() <= 1e-12 * theirs.abs().max()).all())


LAYERS = {LAYERED: ["0", "3", "4", "6", "9"], BLOCKS: ["0", "4", "5.conv1", "5", "6.conv2"]}


@pytest.mark.parametrize("beside", ["closed", "counted"])
@pytest.mark.parametrize("case, layer", [(case, layer) for case in LAYERS for layer in LAYERS[case]])
def test_each_unit_of_a_layer(case: str, layer: str, beside: str) -> None:
    x, units = images(), [0, 3, 5, 7]
    found = ours(case, x, 2, [(layer, units)], beside)
    conditions = [{layer: [unit], "y": [2]} for unit in units]
    expected = theirs(case, x, conditions, parallel=beside == "closed")
    same(found.flatten(0, 1), expected)


@pytest.mark.parametrize("beside", ["closed", "counted"])
@pytest.mark.parametrize("case", MODELS)
def test_units_of_several_layers_and_sets_of_them(case: str, beside: str) -> None:
    x, (low, high) = images(), (LAYERS[case][1], LAYERS[case][3])
    together = [(high, (1, 2, 4)), (low, (0, 3))]
    expected = theirs(case, x, [{high: [1, 2, 4], low: [0, 3], "y": [1]}], parallel=beside == "closed")
    same(ours(case, x, 1, together, beside), expected)
    if beside == "closed":
        each = ours(case, x, 1, [(high, [1, 4]), (low, [0, (2, 3)])], beside)
        pairs = [(above, below) for above in ([1], [4]) for below in ([0], [2, 3])]
        conditions = [{high: above, low: below, "y": [1]} for above, below in pairs]
        same(each.flatten(0, 1), theirs(case, x, conditions, parallel=True))


@pytest.mark.parametrize("case", MODELS)
def test_other_outputs_for_other_rows(case: str) -> None:
    x, layer = images(), LAYERS[case][1]
    found = ours(case, x, torch.tensor([2, 0, 1]), [(layer, 3)], "closed")
    conditions = [{layer: [3], "y": [output]} for output in (2, 0, 1)]
    same(found, theirs(case, x, conditions, parallel=True))


class Pictures:
    """A data set as they read it: pictures with the class that is explained."""

    count: ClassVar[int] = 90

    def __init__(self) -> None:
        self.x = images(self.count)
        self.classes = torch.arange(self.count) % 6

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.classes[index])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("pooled", ["sum", "max"])
@pytest.mark.parametrize("case", MODELS)
def test_the_samples_that_units_respond_to(case: str, pooled: Any, share: bool, tmp_path: Path) -> None:
    module, layer, data = MODELS[case](), LAYERS[case][1], Pictures()
    layers = {layer: concepts.ChannelConcept()}
    seen = visualization.FeatureVisualization(
        Pixels(module), data, layers, max_target=pooled, abs_norm=share, path=str(tmp_path)
    )
    seen.run(composite(case), 0, len(data), batch_size=30)
    td = TensorDict({"input": data.x, "class": data.classes}, [len(data)])
    method = LRP(SUM + preset(PRESET), target=Target("output", ("class",)))
    for by, folder in (("relevance", seen.RelMax), ("value", seen.ActMax)):
        found = ReferenceSamples(method, layer, axis=1, top=20, by=by, pooled=pooled, share=share)  # type: ignore[arg-type]
        found.fold(module, td, at_once=30)
        rows, places, amounts = (
            np.load(folder.PATH / f"{layer}_{name}.npy")[:20].T for name in ("data", "rf", "rel")
        )
        told = found.found.told
        torch.testing.assert_close(
            told["amount"][0, 0], torch.from_numpy(amounts), rtol=TOLERANCE, atol=1e-12
        )
        apart = torch.from_numpy(np.abs(np.diff(amounts))) > 1e-9 * float(np.abs(amounts).max())
        alone = torch.ones_like(told["row"][0, 0], dtype=torch.bool)  # not one of several that are equal
        alone[:, 1:] &= apart
        alone[:, :-1] &= apart
        alone[:, -1] = False
        assert alone.double().mean() > 0.8
        assert torch.equal(told["row"][0, 0][alone], torch.from_numpy(rows)[alone])
        assert torch.equal(told["position"][0, 0][alone], torch.from_numpy(places)[alone])
