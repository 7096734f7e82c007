"""Measures give the numbers of captum and quantus, on the same inputs and the same changes of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Gradient, IntegratedGradients
from tdhook.evaluation import complexity, imputed, infidelity, localisation

pytestmark = pytest.mark.peers

OUTPUT = Target("output", 2)


SEEN: list[Tensor] = []
"""What a network was given: a global variable, since what a hook closes over is put back."""


def network() -> tuple[nn.Module, list[Tensor]]:
    """A network, and the inputs that it is given."""
    SEEN.clear()
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    model[0].register_forward_pre_hook(lambda _, given: SEEN.append(given[0].detach().clone()))
    return model, SEEN


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"noise": 0.3}, {"baseline": None, "noise": 0.2, "share": 1.0}, {"baseline": 0.5}],
)
def test_infidelity_is_that_of_captum(multiplied: bool, options: dict[str, Any]) -> None:
    metrics = pytest.importorskip(
        "captum.metrics", reason="captum is not installed; `nox -s peers` installs it"
    )
    model, seen = network()
    td = TensorDict({"input": torch.randn(5, 7).double()}, [5])
    baseline = options.get("baseline", 0.0) or 0.0
    method = IntegratedGradients(OUTPUT, baseline=baseline) if multiplied else Gradient(OUTPUT, signed=True)
    explained = method.wrap(model)(td.clone())
    seen.clear()
    ours = infidelity(model, explained, target=OUTPUT, multiplied=multiplied, draws=20, **options)
    (changed,) = [x for x in seen if len(x) == 5 * 20]  # rows first, as captum repeats inputs

    @metrics.infidelity_perturb_func_decorator(multiplied)  # type: ignore[untyped-decorator]
    def change(*_: object) -> Tensor:
        return changed

    for normalize, figure in ((False, ours.infidelity), (True, ours.scaled)):
        theirs = metrics.infidelity(
            model,
            change,
            td["input"],
            explained["attr", "input"],
            baselines=torch.full((5, 7), baseline).double(),
            target=2,
            n_perturb_samples=20,
            normalize=normalize,
        )
        torch.testing.assert_close(figure, theirs, rtol=1e-6, atol=1e-10)


def call(metric: Any, relevance: Tensor, **options: Any) -> Tensor:
    """What a metric of quantus says of relevance ``[rows, *shape]`` that is there already."""
    rows = len(relevance)
    return torch.tensor(
        metric(
            model=None,
            x_batch=torch.zeros_like(relevance).numpy(),
            y_batch=torch.zeros(rows).numpy(),
            a_batch=relevance.numpy(),
            **options,
        )
    ).double()


@pytest.mark.filterwarnings("ignore")
def test_localisation_and_complexity_are_those_of_quantus() -> None:
    quantus = pytest.importorskip("quantus")
    plain: dict[str, Any] = {"normalise": False, "abs": False, "disable_warnings": True}
    relevance = torch.rand(6, 1, 8, 9).double()
    masks = torch.rand(6, 1, 8, 9) < 0.3
    td = TensorDict({"attr": {"input": relevance}}, [6])
    ours = localisation(td, TensorDict({"input": masks}, [6]))
    theirs = {
        "pointing": quantus.PointingGame(**plain),
        "mass": quantus.RelevanceMassAccuracy(**plain),
        "rank": quantus.RelevanceRankAccuracy(**plain),
    }
    for name, metric in theirs.items():
        found = call(metric, relevance, s_batch=masks.numpy())
        torch.testing.assert_close(ours.figures()[name], found, msg=name)
    shared = complexity(td)
    flat = relevance.flatten(1)
    sparse = call(quantus.Sparseness(**plain), flat)
    torch.testing.assert_close(shared.sparseness, sparse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.entropy, call(quantus.Complexity(**plain), flat), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.filterwarnings("ignore")
def test_imputed_pixels_are_those_of_quantus(share: float) -> None:
    pytest.importorskip("quantus")
    from quantus.functions.perturb_func import noisy_linear_imputation

    picture, removed = torch.randn(3, 14, 11).double(), torch.rand(14, 11) < share
    removed[0, 0] = False
    places = removed.flatten().nonzero()[:, 0].numpy()
    theirs = torch.from_numpy(noisy_linear_imputation(picture.numpy(), places, noise=0.0))
    torch.testing.assert_close(imputed(picture, removed.expand(3, 14, 11)), theirs, rtol=1e-7, atol=1e-7)
