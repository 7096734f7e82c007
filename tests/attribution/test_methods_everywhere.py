"""Methods that ask many times: in buffers, trackers, jobs, curves, half of a batch at a time, and as one graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, References, Target
from tdhook.attribution import (
    Averaged,
    BlurIntegratedGradients,
    Conductance,
    Deconvnet,
    ExpectedGradients,
    Flips,
    GradCAM,
    GradCAMPlusPlus,
    Gradient,
    GuidedBackprop,
    HiResCAM,
    IntegratedGradients,
    InternalInfluence,
    LayerCAM,
    Noise,
    Product,
    XGradCAM,
)
from tdhook.evaluation import perturbation_curve

T = Target("output", 1)
DATA = TensorDict({"input": torch.rand(30, 1, 6, 6)}, [30])
METHODS = {
    "integrated": IntegratedGradients(T, ledger=True),
    "until a tolerance": IntegratedGradients(T, tolerance=1e-3),
    "from samples": IntegratedGradients(T, baseline=References("sample", 3, spread=True)),
    "from the mean": IntegratedGradients(T, baseline="mean", tolerance=1e-3),
    "expected": ExpectedGradients(T, samples=4),
    "expected, of data": ExpectedGradients(T, baseline=DATA, samples=4, ledger=True),
    "conductance": Conductance(T, input_modules=["1"], steps=6),
    "influence": InternalInfluence(T, input_modules=["1"], steps=6),
    "blurred": BlurIntegratedGradients(T, width=1.5, steps=6),
    "over noise": Averaged(LRP("epsilon_plus", target=T), Noise(0.1, 5), spread=True),
    "over noise, from samples": Averaged(LRP("deeplift", target=T, baseline="sample"), Noise(0.1, 5)),
    "over references": Averaged(LRP("deeplift", target=T, baseline=0.0), References("sample", 4)),
    "over flips": Averaged(Gradient(T, signed=True), Flips(-1)),
    "map": GradCAM("1", T),
    "guided map": Product(GradCAM("1", T), GuidedBackprop()),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def policy() -> TensorDictModule:
    return TensorDictModule(network(), ["input"], ["output"])


def batch(count: int = 12) -> TensorDict:
    return TensorDict({"input": torch.rand(count, 1, 6, 6)}, [count])


LAYERED = {"conductance", "influence", "map", "guided map"}
INPUTS = pytest.mark.parametrize(
    "method",
    [m for name, m in METHODS.items() if name not in LAYERED],
    ids=[n for n in METHODS if n not in LAYERED],
)


@INPUTS
@pytest.mark.parametrize("at_once", [1, 5])
def test_a_buffer_explains_parts_as_the_whole(method, at_once) -> None:
    from tdhook.rl import Explain

    pytest.importorskip("torchrl")
    td, model = batch(), policy()
    found = Explain(method, model, at_once=at_once)(td.clone())
    whole = method.wrap(model)(td.clone())
    for key in whole.keys(True, True):
        if isinstance(key, tuple):
            torch.testing.assert_close(found[key], whole[key], rtol=1e-4, atol=1e-6)


@INPUTS
def test_curves_rank_by_it(method) -> None:
    curves = perturbation_curve(network(), batch(6), method, target=T, steps=4)
    assert curves.most.value.shape[0] == 6
    assert curves.most.value.isfinite().all()


def test_a_tracker() -> None:
    pytest.importorskip("torchrl")
    from tdhook.rl import AttributionTracker

    model, td = policy(), batch()
    for method in (METHODS["over noise"], METHODS["until a tolerance"], METHODS["expected"]):
        tracker = AttributionTracker(method, model, probe=td)
        for step in range(2):
            tracker.update(td.clone(), step=step)
        assert tracker.history["drift/first"][-1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["over noise", "until a tolerance", "from the mean", "over flips"])
def test_a_job(name, tmp_path: Path) -> None:
    from tdhook.datasets import Job

    td, model = batch(10), policy()
    for chunk in (3, 10):
        job = Job(METHODS[name], model, td, tmp_path / f"{chunk}", chunk=chunk)
        job.work()
    one, other = (Job(METHODS[name], model, td, tmp_path / f"{c}", chunk=c).result().rows for c in (3, 10))
    torch.testing.assert_close(one[:]["attr", "input"], other[:]["attr", "input"], rtol=1e-4, atol=1e-6)


COMPILED = {
    **METHODS,
    "layer map": LayerCAM("1", T),
    "map, plus plus": GradCAMPlusPlus("1", T),
    "map in high resolution": HiResCAM("1", T),
    "weighted map": XGradCAM("1", T),
    "guided": GuidedBackprop(T),
    "deconvnet": Deconvnet(T),
    "all outputs": Averaged(LRP("epsilon", target=Target("output", "all")), Noise(0.1, 5)),
}
del COMPILED["until a tolerance"], COMPILED["from the mean"]
QUICK = {"integrated", "over noise"}


@pytest.mark.filterwarnings("error", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if name in QUICK else pytest.mark.slow, id=name)
        for name, m in COMPILED.items()
    ],
)
def test_one_graph_says_what_eager_does(method) -> None:
    torch._dynamo.reset()
    eager = method.wrap(network())
    graph = method.asked(compile={"backend": "aot_eager"}).wrap(network())
    for count in (4, 4, 7):
        td = batch(count)
        found, expected = graph(td.clone()), eager(td)
        assert set(found.keys(True, True)) == set(expected.keys(True, True))
        for key in expected.keys(True, True):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert graph._graphs.wanted
    assert graph._graphs.function is not None
