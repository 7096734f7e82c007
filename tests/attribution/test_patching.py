"""Patching: effects as they are defined, patched and approximated, of nodes, edges, heads and positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Contrast, Target
from tdhook.attribution import (
    Ablation,
    Averaged,
    Gradient,
    GradientTimesInput,
    IntegratedGradients,
    Noise,
    Patching,
)
from tdhook.attribution.catalogue import method, method_from_dict
from tdhook.perturbing.quadrature import quadrature
from tdhook.rules import EpsilonRule
from tdhook.targets import AtStep, Through

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Block(nn.Module):
    """What a transformer adds to its residual stream: attention of two heads, and a gated network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(-3, -2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(z.transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """Reads tokens, and answers after the last."""

    def __init__(self, size: int = 6, words: int = 9) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size)
        self.blocks = nn.ModuleList([Block(size), Block(size)])
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., -1, :]


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().double().requires_grad_(False)


def two(clean: Tensor, corrupt: Tensor, batch: list[int], key: str = "input") -> TensorDict:
    sides = {"clean": TensorDict({key: clean}, batch), "corrupt": TensorDict({key: corrupt}, batch)}
    return TensorDict(sides, batch)


def tokens(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    clean = torch.randint(9, (*batch, 5))
    return two(clean, clean.roll(1, -1), list(batch))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)).double()


def states(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    clean, corrupt = torch.randn(2, *batch, 4).double()
    return two(clean, corrupt, list(batch))


def values(model: nn.Module, x: Tensor, places: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model answers, and its values at places, on the tape."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, args, output=None):
            value = (args[0] if output is None else output).clone()
            if not value.requires_grad:
                value.requires_grad_()
            found[name] = value
            return (value,) if output is None else value

        return hook

    hooks = []
    for name in places:
        module = model.get_submodule(name.removesuffix(":input"))
        on = module.register_forward_pre_hook if name.endswith(":input") else module.register_forward_hook
        hooks.append(on(keep(name)))
    try:
        return model(x), found
    finally:
        for hook in hooks:
            hook.remove()


def patched(model: nn.Module, x: Tensor, place: str, value: Tensor) -> Tensor:
    """What a model answers with another value at a place."""
    module = model.get_submodule(place.removesuffix(":input"))
    if place.endswith(":input"):
        hook = module.register_forward_pre_hook(lambda module, args: (value,))
    else:
        hook = module.register_forward_hook(lambda module, args, output: value)
    try:
        with torch.no_grad():
            return model(x)
    finally:
        hook.remove()


PLACES = ["words", "blocks.0", "blocks.0.out", "blocks.1.mlp", "blocks.1.out:input", "blocks.1.norm2:input"]
WHICH = 2


def both_sides(model: nn.Module, td: TensorDict, patch: str, places: list[str]):
    """The run that is patched, and what is put into it: answers and values at places; and the sign of an effect."""
    runs = {side: values(model, td[side, "input"], places) for side in ("clean", "corrupt")}
    here = "corrupt" if patch == "clean" else "clean"
    return runs[here], runs[patch], td[here, "input"], 1 if patch == "clean" else -1


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


def test_heads_and_positions_are_sums_of_values() -> None:
    model, td, target = reader(), tokens(3), Target("output", WHICH)
    at = "blocks.0.out:input"

    def effects(**options) -> Tensor:
        return Patching("atp", target, at=at, use_inputs=False, **options).wrap(model)(td.clone())["attr", at]

    each = effects()
    torch.testing.assert_close(effects(axis=1), each.sum(-1), **EXACT)
    torch.testing.assert_close(effects(heads=2), each.unflatten(-1, (2, 3)).sum((1, -1)), **EXACT)
    torch.testing.assert_close(effects(axis=(1, -1), heads=2), each.unflatten(-1, (2, 3)).sum(-1), **EXACT)
    torch.testing.assert_close(effects(axis=-1), each.sum(1), **EXACT)
    torch.testing.assert_close(effects(axis=()), each.sum((1, 2)), **EXACT)


def test_a_head_is_patched_as_its_piece_of_the_layer() -> None:
    model, td, target = reader(), tokens(2), Target("output", WHICH)
    at = "blocks.0.out:input"
    (y, here), (_, there), x, _ = both_sides(model, td, "clean", [at])
    found = Patching("exact", target, at=at, axis=(1, -1), heads=2, use_inputs=False).wrap(model)(td.clone())
    for token in range(5):
        for head in range(2):
            value, piece = here[at].detach().clone(), slice(3 * head, 3 * head + 3)
            value[:, token, piece] = there[at][:, token, piece].detach()
            expected = (patched(model, x, at, value) - y)[:, WHICH].detach()
            torch.testing.assert_close(found["attr", at][:, token, head], expected, **EXACT)


@pytest.mark.parametrize("by", ["atp", "relp", "eap_ig", "by_share", "exact"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_any_batch_shape(by: str, batch: tuple[int, ...]) -> None:
    model, td = network(), states(*batch)
    made = Patching(by, Target("output", "argmax"), at=["1", "input"]).wrap(model)
    found = made(td.clone())
    assert found["attr", "1"].shape == (*batch, 6) and found["attr", "input"].shape == (*batch, 4)
    assert found["ledger", "target"].shape == batch
    flat = made(td.reshape(-1) if batch else td.unsqueeze(0))
    for key in (("attr", "1"), ("attr", "input"), ("ledger", "target")):
        torch.testing.assert_close(found[key].reshape(flat[key].shape), flat[key], **EXACT)


@pytest.mark.parametrize("by", ["atp", "epsilon", "eap_ig", "by_share", "exact"])
def test_several_outputs_are_explained_side_by_side(by: str) -> None:
    model, td = network(), states(2, 3)
    options = {"at": ["1", "2:input"], "axis": -1, "heads": 1} if by == "exact" else {"at": ["1", "2:input"]}
    several = Patching(by, Target("output", "all"), **options).wrap(model)(td.clone())
    assert several["ledger", "target"].shape == (2, 3, 3)
    for output in range(3):
        one = Patching(by, Target("output", output), **options).wrap(model)(td.clone())
        for key in (("attr", "1"), ("attr", "2:input"), ("ledger", "target")):
            torch.testing.assert_close(several[key][:, :, output], one[key], **EXACT)


def test_convolutions_on_a_batch_of_two_axes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).double()
    clean, corrupt = torch.randn(2, 2, 3, 1, 6, 6).double()
    td = two(clean, corrupt, [2, 3])
    for by in ("atp", "exact"):
        found = Patching(by, Target("output", 0), at=["1", "0:input"], axis=1).wrap(model)(td.clone())
        assert found["attr", "1"].shape == (2, 3, 3) and found["attr", "0:input"].shape == (2, 3, 1)
        one = two(clean[1, 2:], corrupt[1, 2:], [1])
        one = Patching(by, Target("output", 0), at=["1", "0:input"], axis=1).wrap(model)(one)
        torch.testing.assert_close(found["attr", "1"][1, 2:], one["attr", "1"], **EXACT)


def policy() -> TensorDictSequential:
    torch.manual_seed(0)
    return TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), [("agents", "observation")], ["hidden"]),
        TensorDictModule(nn.Linear(5, 3), ["hidden"], ["logits"]),
    ).double()


def test_keys_are_places_and_what_both_share_lies_at_its_own_key() -> None:
    model = policy()
    clean, corrupt = torch.randn(2, 3, 4).double()
    td = TensorDict({"hint": torch.ones(3)}, [3])
    td["clean", "agents", "observation"], td["corrupt", "agents", "observation"] = clean, corrupt
    why = Contrast(Target("logits", 0), Target("logits", 1))
    made = Patching("atp", why, at=["hidden", ("agents", "observation"), "module.0.module.0"]).wrap(model)
    assert made.in_keys == [("clean", "agents", "observation"), ("corrupt", "agents", "observation")]
    found = made(td)
    exact = Patching("exact", why, at=["hidden"], axis=()).wrap(model)(td.clone())
    torch.testing.assert_close(found["attr", "hidden"].sum(-1), exact["attr", "hidden"], **EXACT)
    assert found["attr", "agents", "observation"].shape == (3, 4)
    assert set(made.out_keys) >= {("attr", "hidden"), ("attr", "module.0.module.0"), ("ledger", "corrupt")}
    # Only one side differs from what lies at the key itself.
    shared = TensorDict(
        {("agents", "observation"): clean, ("corrupt", "agents", "observation"): corrupt}, [3]
    )
    shared["clean"] = TensorDict({}, [3])
    again = Patching("atp", why, at=["hidden"]).wrap(model)(shared)
    torch.testing.assert_close(again["attr", "hidden"], found["attr", "hidden"], **EXACT)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).tanh()


def test_a_module_that_runs_twice_is_two_places() -> None:
    torch.manual_seed(0)
    model, td = Twice().double(), states(3)
    for by in ("atp", "exact"):
        found = Patching(by, Target("output", 0), at="layer").wrap(model)(td.clone())
        assert sorted(found["attr"].keys()) == ["layer", "layer:1"]
    edge = Patching("atp", Target("output", 0), edges=[("layer", "layer:input")])
    with pytest.raises(
        ValueError, match="there is no edge from 'layer' to 'layer:input', which is given before"
    ):
        edge.wrap(model)(td.clone())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_parts_partition_a_layer(tokens: int, heads: int, size: int, data: st.DataObject) -> None:
    """However a layer is taken apart: sums of effects stay, and each value belongs to one part."""
    torch.manual_seed(tokens + heads)
    model = nn.Sequential(nn.Linear(2, heads * size), nn.Tanh(), nn.Linear(heads * size, 1)).double()
    clean, corrupt = torch.randn(2, 3, tokens, 2).double()

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum(-2)

    axes = data.draw(st.sampled_from([(), (1,), (-1,), (1, -1), (2, 1)]))
    given_heads = heads if axes and axes[-1] in (-1, 2) else None
    td = two(clean, corrupt, [3])
    found, exact = (
        Patching(by, at="inner.1", axis=axes, heads=given_heads).wrap(Summed())(td.clone())["attr", "inner.1"]
        for by in ("atp", "exact")
    )
    # Behind the place the model is linear.
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found.reshape(3, -1).sum(1), (model(clean) - model(corrupt)).sum((1, 2)), **EXACT
    )


def test_a_policy_that_holds_state_is_run_as_from_the_start() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()).double())
            self.layer = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.layer(x) * self.seen

    torch.manual_seed(0)
    td = states(3)
    for by in ("atp", "eap_ig", "by_share", "exact"):
        model = Counting()
        found = Patching(by, Target("output", 0), at="layer").wrap(model)(td.clone())
        rise = (model.layer(td["clean", "input"]) - model.layer(td["corrupt", "input"]))[:, 0].detach()
        torch.testing.assert_close(found["attr", "layer"][:, 0], rise, **EXACT)
        assert model.seen == 1


def test_methods_by_name_and_from_data() -> None:
    model, td = network(), states(3)
    data = {"method": "patching", "by": {"method": "gradient"}, "at": ["1"], "target": Target("output", 0)}
    by_data = method_from_dict(data).wrap(model)(td.clone())
    by_name = method("patching", by="atp", at=["1"], target=Target("output", 0)).wrap(model)(td.clone())
    torch.testing.assert_close(by_data["attr", "1"], by_name["attr", "1"], **EXACT)
    times_input = Patching(GradientTimesInput(), Target("output", 0), at="1").wrap(model)(td.clone())
    torch.testing.assert_close(by_data["attr", "1"], times_input["attr", "1"], **EXACT)
    assert repr(Patching("exact", at="1")) == "Patching(exact, at=['1'], patch='clean')"


def test_asked_and_explaining_ask_the_method() -> None:
    model, td = network(), states(3)
    made = Patching(Gradient(Target("output", 0)), at="1")
    other = made.explaining(Target("output", 1)).asked(attribution_key="effect").wrap(model)(td.clone())
    expected = Patching(Gradient(Target("output", 1)), at="1").wrap(model)(td.clone())
    torch.testing.assert_close(other["effect", "1"], expected["attr", "1"], **EXACT)


@pytest.mark.parametrize("by", ["atp", "epsilon", "eap_ig", "by_share", "exact"])
def test_compiled_equals_eager(by: str) -> None:
    model, td = network(), states(3)
    options = {"at": ["1", "2:input"], "axis": -1}
    eager = Patching(by, Target("output", 0), **options).wrap(model)(td.clone())
    quickly = {"backend": "aot_eager"}
    compiled = Patching(by, Target("output", 0), compile=quickly, **options).wrap(model)(td.clone())
    for key in (("attr", "1"), ("attr", "2:input"), ("ledger", "target"), "output"):
        torch.testing.assert_close(compiled[key], eager[key], **EXACT)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Patching("atp"), "nothing is patched: name places"),
        (
            lambda: Patching("nothing", at="1"),
            "no coefficients are named 'nothing': there are atp, by_share, eap_ig, exact",
        ),
        (lambda: Patching("atp", at="1", patch="both"), "patch is 'clean' or 'corrupt'"),
        (lambda: Patching("atp", edges=[("1", "2")]), "ends at '2', .* write '2:input'"),
        (lambda: Patching("atp", at="1", axis=(), heads=2), "along the last of some axes; got heads=2"),
        (lambda: Patching("atp", at="1", heads=0), "heads are at least one"),
        (lambda: Patching(LRP("epsilon", ledger=True), at="1"), "leave out ledger"),
    ],
)
def test_what_cannot_be_made(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_methods_without_coefficients() -> None:
    for by in (Ablation(), Averaged(Gradient(), Noise(0.1, 2))):
        with pytest.raises(
            TypeError, match="gives no coefficients of activations; Gradient, IntegratedGradients"
        ):
            Patching(by, at="1")


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"at": "9"}, ValueError, "the model has no module '9'"),
        ({"at": "1", "axis": 0}, IndexError, r"axis=0 is no axis of parts of .*'batch', 6"),
        ({"at": "1", "axis": 2}, IndexError, "one of 1 to 1, or of -1 to -1"),
        ({"at": "1", "axis": (1, -1)}, IndexError, "names an axis of .* twice"),
        ({"at": "1", "heads": 4}, ValueError, "the axis of 6 of .* does not consist of 4 equal heads"),
        ({"edges": [("1", "4:input")]}, ValueError, r"joins shapes \[3, 6\] and \[3, 5\]"),
        ({"edges": [("3", "3:input")]}, ValueError, "there is no edge from '3' to '3:input'"),
    ],
)
def test_what_cannot_be_patched(options, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Patching("atp", Target("output", 0), **options).wrap(network())(states(3))


def test_a_target_that_is_no_value() -> None:
    through = Through(Target("output", 0), "1", units=0)
    with pytest.raises(ValueError, match="relevance through units is none: name the way by edges"):
        Patching("atp", through, at="0").wrap(network())(states(3))


def test_a_place_that_is_never_run() -> None:
    with pytest.raises(ValueError, match="there is nothing to patch at 'other': the model does not run it"):
        Patching("atp", Target("output", 0), at=["layer", "other"]).wrap(Twice().double())(states(3))


def test_a_place_that_is_run_in_one_run_alone() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else self.a(x)

    td = two(torch.ones(2, 4).double(), -torch.ones(2, 4).double(), [2])
    for by in ("atp", "exact"):
        with pytest.raises(
            ValueError, match="'b' was not run as often in the clean run as in the corrupt one"
        ):
            Patching(by, Target("output", 0), at=["a", "b"]).wrap(Some().double())(td.clone())


def test_sides_that_lack_something() -> None:
    made = Patching("atp", Target("output", 0), at="1").wrap(network())
    with pytest.raises(KeyError, match=r"key 'clean' is missing .* at \('clean', key\) and at"):
        made(TensorDict({"input": torch.zeros(2, 4).double()}, [2]))
    td = states(2)
    del td["corrupt", "input"]
    with pytest.raises(
        KeyError, match=r"key \('corrupt', 'input'\) is missing from the TensorDict, which has"
    ):
        made(td)
    td = two(torch.zeros(2, 4), torch.zeros(2, 4), [2], key="state")
    with pytest.raises(KeyError, match="key 'input' is missing from the TensorDict"):
        made(td)
    td = two(torch.zeros(2, 5), torch.zeros(2, 4), [2])
    with pytest.raises(
        ValueError, match=r"entry 'input' has the shape \[2, 5\] in the clean batch and \[2, 4\]"
    ):
        made(td)


def test_tokens_without_a_place_to_go_from() -> None:
    model, td = reader(), tokens(2)
    with pytest.raises(
        ValueError, match=r"IntegratedGradients looks at two inputs, .*input_modules=\[\.\.\.\]"
    ):
        Patching("eap_ig", Target("output", 0), at="blocks.0", use_inputs=False).wrap(model)(td.clone())
    by = LRP("relp", target=Target("output", 0), baseline=0.0, input_modules=["blocks.0"], use_inputs=False)
    with pytest.raises(ValueError, match=r"what is compared differs at .'words',. by itself"):
        Patching(by, at=["words"]).wrap(model)(td.clone())


def test_a_tolerance_is_not_one_of_coefficients() -> None:
    by = IntegratedGradients(Target("output", 0), tolerance=0.1)
    with pytest.raises(
        ValueError, match=r"a tolerance is of the sum over the inputs, .*: give steps instead"
    ):
        Patching(by, at="1").wrap(network())(states(2))


class Summing(nn.Module):
    """Linear, and each step sees all before it: ``[*batch, time, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).cumsum(-2))


@pytest.mark.parametrize("index", [1, "all"])
@pytest.mark.parametrize("step", [None, "last", 1])
@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_steps_that_see_each_other_are_patched_one_by_one(index, step, patch: str) -> None:
    td = two(torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double(), [2, 5])
    target = Target("output", index) if step is None else AtStep(Target("output", index), step)
    model = Summing().double()
    td.names = [None, "time"]
    exact, approximate = (
        Patching(by, target, at=["first", "input"], patch=patch).wrap(model)(td.clone())
        for by in ("exact", "atp")
    )
    for key in ("first", "input"):
        torch.testing.assert_close(exact["attr", key], approximate["attr", key], **EXACT)
    for axis in ((), 1):
        exact, approximate = (
            Patching(by, target, at=["first"], axis=axis, patch=patch).wrap(model)(td.clone())
            for by in ("exact", "atp")
        )
        torch.testing.assert_close(exact["attr", "first"], approximate["attr", "first"], **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_patches_do_not_look_at_each_other(seed) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.of(self.first(x))

        def of(self, hidden: Tensor) -> Tensor:
            return hidden.tanh() + 0.5 * hidden.tanh().roll(1, 0)

    torch.manual_seed(seed)
    model, clean, corrupt = Shifted().double(), torch.randn(3, 3).double(), torch.randn(3, 3).double()
    with torch.no_grad():
        into, put = model.first(corrupt), model.first(clean)
        expected = torch.zeros_like(into)
        for place in itertools.product(range(3), range(4)):
            changed = into.clone()
            changed[place] = put[place]
            expected[place] = (model.of(changed) - model.of(into))[:, 0].sum()
    found = Patching("exact", Target("output", 0), at="first").wrap(model)(two(clean, corrupt, [3]))
    torch.testing.assert_close(found["attr", "first"], expected, **EXACT)


def test_what_is_seen_at_one_place_is_not_taken_for_another() -> None:
    model, td = Summing().double(), two(torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double(), [2, 5])
    at, quickly = ["last", "first", "last:input"], {"backend": "aot_eager"}
    compiled = Patching("exact", Target("output", 1), at=at, compile=quickly)
    explained, approximate = compiled.wrap(model), Patching("atp", Target("output", 1), at=["last", "first"])
    for _ in range(3):
        found = explained(td.clone())
    expected = approximate.wrap(model)(td.clone())
    for key in ("last", "first"):
        torch.testing.assert_close(found["attr", key], expected["attr", key], **EXACT)


def test_elements_of_a_flat_batch_that_see_each_other() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((h - h.mean(0)).tanh())

    model = Centred().double()
    td = two(torch.randn(4, 3).double(), torch.randn(4, 3).double(), [4])
    found = Patching("exact", Target("output", 1), at=["first"]).wrap(model)(td.clone())["attr", "first"]
    with torch.no_grad():
        clean, h = model.first(td["clean", "input"]), model.first(td["corrupt", "input"])

        def value(h: Tensor) -> Tensor:
            return model.last((h - h.mean(0)).tanh())[:, 1].sum()

        for element in range(4):
            for unit in range(4):
                changed = h.clone()
                changed[element, unit] = clean[element, unit]
                torch.testing.assert_close(found[element, unit], value(changed) - value(h), **EXACT)


def test_what_is_infinite_in_both_runs_has_no_effect() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.mask = nn.Linear(4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            scores = self.scores(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)
            return self.mask(scores).softmax(-1)

    torch.manual_seed(0)
    model, td = Masked().double(), states(3)
    for by in ("atp", "by_share", "exact"):
        found = Patching(by, Target("output", 0), at="mask").wrap(model)(td.clone())["attr", "mask"]
        assert found.isfinite().all() and (found[:, 2] == 0).all() and found[:, :2].all()


def test_what_is_infinite_in_one_run_alone_is_patched_and_not_approximated() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.mask = nn.Linear(4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            masked = (x[:, :1] > 0) & torch.tensor([False, False, True])
            return self.mask(self.scores(x).masked_fill(masked, -torch.inf)).softmax(-1)

    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(2, 4).double()
    td = two(x.abs(), -x.abs(), [2])
    for by in ("atp", "by_share"):
        with pytest.raises(ValueError, match="effects of 'mask' are not finite: its difference is infinite"):
            Patching(by, Target("output", 0), at="mask").wrap(model)(td.clone())
    exact = Patching("exact", Target("output", 0), at="mask").wrap(model)(td.clone())["attr", "mask"]
    whole = model.scores(-x.abs()).detach()
    without = whole[:, :2].softmax(-1)[:, 0] - whole.softmax(-1)[:, 0]
    torch.testing.assert_close(exact[:, 2], without, **EXACT)


@pytest.mark.parametrize("seed", [1, 15])
def test_steps_that_decide_by_all_are_patched_beside_none(seed: int) -> None:
    """Which row an element takes is told by the mean of all, which variants of a batch would share with it."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.decided(self.first(x)))

        def decided(self, h: Tensor) -> Tensor:
            return torch.where(h[:, :1] > h[:, :1].mean(), h, h.roll(1, 0))

    torch.manual_seed(seed)
    model = Deciding().double()
    td = two(torch.randn(2, 4).double(), torch.randn(2, 4).double(), [2])
    found = Patching("exact", Target("output", 1), at=["first"]).wrap(model)(td.clone())["attr", "first"]
    with torch.no_grad():
        clean, h = model.first(td["clean", "input"]), model.first(td["corrupt", "input"])
        for element, unit in itertools.product(range(2), range(3)):
            changed = h.clone()
            changed[element, unit] = clean[element, unit]
            gained = model.last(model.decided(changed)) - model.last(model.decided(h))
            torch.testing.assert_close(found[element, unit], gained[:, 1].sum(), **EXACT)


def test_nothing_is_left_behind() -> None:
    model, td = network(), states(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for by in ("atp", "epsilon", "eap_ig", "by_share", "exact"):
        Patching(by, Target("output", 0), at=["1", "2:input"]).wrap(model)(td.clone())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
