"""Patching by share: from effects by the gradient to those by the secant, each by its share of the whole change."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient, IntegratedGradients, Patching
from tdhook.attribution.catalogue import method_from_dict

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def two(clean: Tensor, corrupt: Tensor) -> TensorDict:
    batch = clean.shape[:-1]
    sides = {"clean": TensorDict({"input": clean}, batch), "corrupt": TensorDict({"input": corrupt}, batch)}
    return TensorDict(sides, batch)


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, outputs))
    return nn.Sequential(*layers).double()


def states(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return two(*torch.randn(2, *batch, 4).double())


class Squared(nn.Module):
    """The square of the sum of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        total = self.layer(x).sum(-1, keepdim=True)
        return total * total


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
@pytest.mark.parametrize("by", ["by_share", "eap_ig"])
def test_of_a_square_each_part_has_its_exact_effect(by: str, patch: str) -> None:
    model, generator = Squared().double(), torch.Generator().manual_seed(0)
    corrupt = torch.rand(8, 4, generator=generator, dtype=torch.float64)
    clean = corrupt + torch.rand(8, 4, generator=generator, dtype=torch.float64)
    options = {"at": ["layer", "input"], "patch": patch}
    found = Patching(by, by_share=True, **options).wrap(model)(two(clean, corrupt))
    exact = Patching("exact", **options).wrap(model)(two(clean, corrupt))
    gradient = Patching("atp", **options).wrap(model)(two(clean, corrupt))
    for place in ("layer", "input"):
        torch.testing.assert_close(found["attr", place], exact["attr", place], **EXACT)
        assert (gradient["attr", place] - exact["attr", place]).abs().mean() > 0.1


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
@pytest.mark.parametrize("target", [Target("output", 1), Target("output", "all")], ids=["one", "several"])
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_it_goes_from_the_gradient_to_the_method_by_the_share_of_the_change(
    batch: tuple[int, ...], target: Target, patch: str
) -> None:
    model, td = network(), states(*batch)
    options = {"at": ["1", "2:input"], "edges": [("1", "2:input")], "patch": patch}
    secant = LRP("deeplift", target=target, baseline=0.0)
    small = Patching(Gradient(target), **options).wrap(model)(td.clone())
    large = Patching(secant, **options).wrap(model)(td.clone())
    found = Patching("by_share", target, **options).wrap(model)(td.clone())
    for key in (("attr", "1"), ("attr", "2:input"), ("edge", "1", "2:input")):
        share = (large[key] / large["ledger", "target"].unsqueeze(-1)).abs().clamp(max=1.0)
        assert (share == 1).any() and (share < 1).any()
        expected = (1 - share) * small[key] + share * large[key]
        torch.testing.assert_close(found[key], expected, **EXACT)
    for side in ("clean", "corrupt", "target"):
        torch.testing.assert_close(found["ledger", side], large["ledger", side], **EXACT)
    torch.testing.assert_close(found["output"], large["output"], **EXACT)


def test_what_carries_all_of_the_change_has_all_of_it() -> None:
    model, td = network(), states(6)
    found = Patching("by_share", Target("output", 0), at=["0", "1", "3"], axis=()).wrap(model)(td)
    for place in ("0", "1", "3"):
        torch.testing.assert_close(found["attr", place], found["ledger", "target"], rtol=1e-7, atol=1e-9)


def test_what_changes_next_to_nothing_has_the_effect_by_the_gradient() -> None:
    model, td = network(), states(6)
    moved = td["clean", "input"].clone()
    moved[:, 1:] = td["corrupt", "input"][:, 1:]
    moved[:, 3] += 1e-6  # beside a first feature that carries the change
    td = two(moved, td["corrupt", "input"])
    found, gradient, exact = (
        Patching(by, Target("output", 0), at="input").wrap(model)(td.clone())["attr", "input"][:, 3]
        for by in ("by_share", "atp", "exact")
    )
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-14)


def test_where_both_runs_agree_no_part_has_an_effect() -> None:
    td = states(3)
    td["corrupt", "input"][0] = td["clean", "input"][0]
    found = Patching("by_share", Target("output", 0), at=["1", "input"]).wrap(network())(td)
    for key in ("1", "input"):
        assert (found["attr", key][0] == 0).all() and found["attr", key].isfinite().all()
        assert (found["attr", key][1:] != 0).all()


def test_parts_that_cancel_have_the_effects_of_the_method() -> None:
    """The target is the same in both runs, and no part has a share in a change that there is none of."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
    td = two(torch.ones(1, 2).double(), torch.zeros(1, 2).double())
    found = Patching("by_share", at="0").wrap(model)(td)
    assert found["ledger", "target"] == 0
    torch.testing.assert_close(found["attr", "0"], torch.tensor([[1.0, -1.0]]).double(), **EXACT)


def test_share_is_that_of_a_part_and_not_of_its_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(-1, (2, 3)), nn.Flatten(), nn.Linear(6, 1))
    model = nn.Sequential(*model, nn.Tanh()).double()
    td, options = states(5), {"at": "2", "axis": 1}
    small, large, found = (
        Patching(by, **options).wrap(model)(td.clone())
        for by in ("atp", LRP("deeplift", baseline=0.0), "by_share")
    )
    share = (large["attr", "2"] / large["ledger", "target"].unsqueeze(-1)).abs().clamp(max=1.0)
    expected = torch.lerp(small["attr", "2"], large["attr", "2"], share)
    torch.testing.assert_close(found["attr", "2"], expected, **EXACT)


def test_names_data_and_what_it_is_called() -> None:
    model, td = network(), states(3)
    by_name = Patching("by_share", Target("output", 0), at="1")
    data = {"method": "patching", "by": "by_share", "at": ["1"], "target": Target("output", 0)}
    expected = by_name.wrap(model)(td.clone())["attr", "1"]
    torch.testing.assert_close(method_from_dict(data).wrap(model)(td.clone())["attr", "1"], expected, **EXACT)
    given = Patching(LRP("deeplift", target=Target("output", 0), baseline=1.0), at="1", by_share=True)
    torch.testing.assert_close(given.wrap(model)(td.clone())["attr", "1"], expected, **EXACT)
    assert "by_share=True" in repr(given) and by_name.exactly().exact
    asked = by_name.explaining(Target("output", 1)).asked(attribution_key="effect")
    other = Patching("by_share", Target("output", 1), at="1").wrap(model)(td.clone())["attr", "1"]
    torch.testing.assert_close(asked.wrap(model)(td.clone())["effect", "1"], other, **EXACT)


def test_by_the_gradient_it_changes_nothing_and_integrated_gradients_take_it() -> None:
    model, td, target = network(), states(3), Target("output", 0)
    atp, same = (
        Patching("atp", target, at="1", by_share=by_share).wrap(model)(td.clone())["attr", "1"]
        for by_share in (False, True)
    )
    torch.testing.assert_close(same, atp, **EXACT)
    by = IntegratedGradients(target, steps=8)
    plain, shared = (
        Patching(by, at="1", by_share=by_share).wrap(model)(td.clone())["attr", "1"]
        for by_share in (False, True)
    )
    between = (shared - atp) * (plain - shared)
    assert (between >= -1e-12).all() and not torch.allclose(shared, plain)
