"""Patching: effects as they are defined, patched and approximated, of nodes, edges, heads and positions."""

from __future__ import annotations

import pytest
import torch
from runs import (
    EXACT,
    WHICH,
    both_sides,
    network,
    patched,
    reader,
    states,
    tokens,
    two,
    values,
)
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import (
    IntegratedGradients,
    Patching,
)
from tdhook.perturbing.quadrature import quadrature
from tdhook.rules import EpsilonRule

PLACES = ["words", "blocks.0", "blocks.0.out", "blocks.1.mlp", "blocks.1.out:input", "blocks.1.norm2:input"]


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_attribution_patching_is_the_difference_times_the_gradient(patch: str) -> None:
    model, td = reader(), tokens(3)
    (y, here), (_, there), _, sign = both_sides(model, td, patch, PLACES)
    grads = torch.autograd.grad(y[:, WHICH].sum(), [here[name] for name in PLACES])
    found = Patching("atp", Target("output", WHICH), at=PLACES, patch=patch, use_inputs=False)
    found = found.wrap(model)(td.clone())
    for name, grad in zip(PLACES, grads, strict=True):
        expected = sign * (there[name] - here[name]) * grad
        torch.testing.assert_close(found["attr", name], expected, **EXACT)


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_exact_patching_patches(patch: str) -> None:
    model, td = reader(), tokens(2)
    (y, here), (_, there), x, sign = both_sides(model, td, patch, PLACES)
    target = Target("output", WHICH)
    by_token = Patching("exact", target, at=PLACES, patch=patch, axis=1, use_inputs=False).wrap(model)(
        td.clone()
    )
    by_value = Patching("exact", target, at=PLACES[3], patch=patch, use_inputs=False).wrap(model)(td.clone())
    whole = Patching("exact", target, at=PLACES, patch=patch, axis=(), use_inputs=False).wrap(model)(
        td.clone()
    )
    for name in PLACES:
        one = here[name].detach()
        for token in range(5):
            value = one.clone()
            value[:, token] = there[name][:, token].detach()
            expected = sign * (patched(model, x, name, value) - y)[:, WHICH]
            torch.testing.assert_close(by_token["attr", name][:, token], expected.detach(), **EXACT)
        expected = sign * (patched(model, x, name, there[name].detach()) - y)[:, WHICH]
        torch.testing.assert_close(whole["attr", name], expected.detach(), **EXACT)
    name = PLACES[3]
    assert by_value["attr", name].shape == (2, 5, 6)
    for token in range(5):
        for unit in range(6):
            value = here[name].detach().clone()
            value[:, token, unit] = there[name][:, token, unit].detach()
            expected = sign * (patched(model, x, name, value) - y)[:, WHICH]
            torch.testing.assert_close(by_value["attr", name][:, token, unit], expected.detach(), **EXACT)


def test_all_of_a_stream_restores_the_clean_target() -> None:
    model, td = reader(), tokens(3)
    found = Patching("exact", Target("output", "argmax"), at=["words", "blocks.1"], axis=(), use_inputs=False)
    found = found.wrap(model)(td.clone())
    for name in ("words", "blocks.1"):
        torch.testing.assert_close(found["attr", name], found["ledger", "target"], **EXACT)
    torch.testing.assert_close(
        found["ledger", "clean"] - found["ledger", "corrupt"], found["ledger", "target"], **EXACT
    )


def test_the_target_is_what_was_chosen_in_the_clean_run() -> None:
    model, td = network(), states(40)
    clean, corrupt = (model(td[side, "input"]) for side in ("clean", "corrupt"))
    chosen = clean.argmax(-1, keepdim=True)
    assert (corrupt.argmax(-1, keepdim=True) != chosen).any()
    for patch in ("clean", "corrupt"):
        found = Patching("atp", Target("output", "argmax"), at="1", patch=patch).wrap(model)(td.clone())
        for side, answer in (("clean", clean), ("corrupt", corrupt)):
            torch.testing.assert_close(
                found["ledger", side], answer.gather(-1, chosen)[:, 0].detach(), **EXACT
            )
        torch.testing.assert_close(found["output"], clean.detach(), **EXACT)


@pytest.mark.parametrize(
    "by", ["atp", "eap_ig", LRP([(nn.Linear, EpsilonRule(0.0))]), "exact"], ids=["atp", "ig", "lrp", "exact"]
)
@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_of_a_linear_model_all_are_exact(by, patch: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    td = states(5)
    rise = td["clean", "input"] - td["corrupt", "input"]
    found = Patching(by, Target("output", 1), at=["0", "input"], patch=patch).wrap(model)(td.clone())
    weight = model[1].weight[1]
    torch.testing.assert_close(found["attr", "0"], (model[0](rise) * weight).detach(), **EXACT)
    expected = (rise * (weight @ model[0].weight)).detach()
    torch.testing.assert_close(found["attr", "input"], expected, **EXACT)


def test_relevance_patching_takes_relevance_per_activation() -> None:
    model, td = reader(), tokens(3)
    target, at = Target("output", WHICH), PLACES[1:4]
    found = Patching("relp", target, at=at, use_inputs=False).wrap(model)(td.clone())
    lrp = LRP("relp", target=target, input_modules=at, use_inputs=False, values=True).wrap(model)
    clean, corrupt = (lrp(td[side].clone()) for side in ("clean", "corrupt"))
    for name in at:
        here, there = corrupt["value", name], clean["value", name]
        expected = (there - here) * corrupt["attr", name] / here
        torch.testing.assert_close(found["attr", name], expected, **EXACT)


def test_a_unit_at_zero_has_a_coefficient_too() -> None:
    """What ReLU closes in the corrupt run is opened by the clean one."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].bias.zero_()
    td = two(torch.ones(1, 1).double(), -torch.ones(1, 1).double(), [1])
    for by in ("atp", "epsilon", "exact"):
        found = Patching(by, at="1").wrap(model)(td.clone())["attr", "1"]
        torch.testing.assert_close(found, torch.ones(1, 2).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_integrated_gradients_go_from_run_to_run(patch: str) -> None:
    model, td = reader(), tokens(3)
    by = IntegratedGradients(
        Target("output", WHICH), steps=4, rule="right", input_modules=["words"], use_inputs=False
    )
    found = Patching(by, at=PLACES, patch=patch).wrap(model)(td.clone())
    runs = {side: values(model, td[side, "input"], PLACES)[1] for side in ("clean", "corrupt")}
    here, there = runs["corrupt" if patch == "clean" else "clean"], runs[patch]
    total = {name: torch.zeros_like(x) for name, x in here.items()}
    for place, weight in quadrature("right", 4):
        words = torch.lerp(
            there["words"], here["words"], place
        ).detach()  # it ends in the run that is patched
        hook = model.words.register_forward_hook(lambda module, args, output, words=words: words)
        y, at = values(model, td["clean", "input"], PLACES)
        hook.remove()
        for name, grad in zip(
            PLACES, torch.autograd.grad(y[:, WHICH].sum(), [at[name] for name in PLACES]), strict=True
        ):
            total[name] += weight * grad
    for name in PLACES:
        rise = (there[name] - here[name]) * (1 if patch == "clean" else -1)
        torch.testing.assert_close(found["attr", name], (rise * total[name]).detach(), **EXACT)


def test_differences_are_shared_in_full_by_multipliers_against_the_other_run() -> None:
    model, td = reader(), tokens(3)
    by = LRP(
        "deeplift", target=Target("output", WHICH), baseline=0.0, input_modules=["words"], use_inputs=False
    )
    found = Patching(by, at=["words", "blocks.0"], axis=()).wrap(model)(td.clone())
    for name in ("words", "blocks.0"):
        torch.testing.assert_close(found["attr", name], found["ledger", "target"], rtol=1e-7, atol=1e-9)


def test_an_edge_is_what_goes_through_one_input_alone() -> None:
    model, td = reader(), tokens(3)
    edges = [("words", "blocks.0.norm2:input"), ("blocks.0.mlp", "blocks.1.norm1:input")]
    target = Target("output", WHICH)
    for patch in ("clean", "corrupt"):
        places = [place for edge in edges for place in edge]
        (y, here), (_, there), x, sign = both_sides(model, td, patch, places)
        found = Patching("atp", target, edges=edges, patch=patch, use_inputs=False).wrap(model)(td.clone())
        exact = Patching("exact", target, edges=edges, patch=patch, axis=1, use_inputs=False)
        exact = exact.wrap(model)(td.clone())
        for source, end in edges:
            (grad,) = torch.autograd.grad(y[:, WHICH].sum(), here[end], retain_graph=True)
            rise = (there[source] - here[source]).detach()
            torch.testing.assert_close(found["edge", source, end], sign * rise * grad, **EXACT)
            for token in range(5):
                value = here[end].detach().clone()
                value[:, token] += rise[:, token]
                expected = sign * (patched(model, x, end, value) - y)[:, WHICH].detach()
                torch.testing.assert_close(exact["edge", source, end][:, token], expected, **EXACT)


def test_edges_of_a_linear_residual_stream_sum_to_the_node() -> None:
    """What the words do goes through the two inputs that read them, and along the stream itself."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.one, self.two, self.head = (nn.Linear(4, 4, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.words(x)
            x = x + self.one(x)
            x = x + self.two(x)
            return self.head(x)

    torch.manual_seed(0)
    model, td = Stream().double(), states(5)
    ends = ["one:input", "two:input", "head:input"]
    made = Patching("atp", Target("output", 0), at="words", edges=[("words", end) for end in ends])
    found = made.wrap(model)(td)
    total = sum(found["edge", "words", end].sum(-1) for end in ends)
    torch.testing.assert_close(total, found["attr", "words"].sum(-1), **EXACT)
    assert made.wrap(model).out_keys[:1] == ["output"]
