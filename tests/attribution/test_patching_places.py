"""Patching: what may be patched, of batches of any shape, by heads, keys and calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    EXACT,
    WHICH,
    Twice,
    both_sides,
    network,
    patched,
    reader,
    states,
    tokens,
    two,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import Contrast, Target
from tdhook.attribution import (
    Gradient,
    GradientTimesInput,
    Patching,
)
from tdhook.attribution.catalogue import method, method_from_dict


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
