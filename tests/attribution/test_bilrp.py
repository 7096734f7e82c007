"""BiLRP: relevance of pairs, against what the definition says, and what it adds up to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import (
    Averaged,
    BiLRP,
    GradientTimesInput,
    IntegratedGradients,
    Noise,
    Pair,
)
from tdhook.targets import Computed
from tdhook.targets.hindsight import InHindsight

A, B = ("a", "output"), ("b", "output")
PAIR = ("pairs", "a", "input", "b", "input")


def encoder(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 12, bias=bias),
        nn.ReLU(),
        nn.Linear(12, 8, bias=bias),
    ).double()


def two(*batch: int, shape: tuple[int, ...] = (4,), other: tuple[int, ...] | None = None) -> TensorDict:
    torch.manual_seed(1)
    made = {
        name: {"input": torch.randn(*batch, *features).double()}
        for name, features in (("a", shape), ("b", other or shape))
    }
    return TensorDict(made, list(batch))


class Critic(nn.Module):
    """A contrastive critic: what a state and an action lead to, and a goal, in one space."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16, bias=False), nn.ReLU(), nn.Linear(16, 6, bias=False))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        phi: Tensor = self.layers(torch.cat([state, action], -1))
        return phi


def critic() -> TensorDictSequential:
    torch.manual_seed(0)
    goals = nn.Sequential(nn.Linear(2, 16, bias=False), nn.ReLU(), nn.Linear(16, 6, bias=False))
    return TensorDictSequential(
        TensorDictModule(Critic(), ["state", "action"], ["phi"]), TensorDictModule(goals, ["goal"], ["psi"])
    ).double()


def transitions(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    widths = {"state": 3, "action": 2, "goal": 2}
    return TensorDict({key: torch.randn(*batch, n).double() for key, n in widths.items()}, list(batch))


@pytest.mark.parametrize("composite", ["epsilon", "attn_lrp", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_the_definition(composite: str) -> None:
    net, td = encoder(bias=True), two(3)
    found = BiLRP(LRP(composite), A, B).wrap(Pair(net))(td.clone())
    each = {}
    for name in "ab":
        explained = LRP(composite, target=Target("output", "all")).wrap(net)
        each[name] = explained(td[name].clone())["attr", "input"]
    matrix = sum(torch.einsum("bi,bj->bij", each["a"][:, m], each["b"][:, m]) for m in range(8))
    assert isinstance(matrix, Tensor)
    assert_close(found[PAIR], matrix)
    z, other = (net(td[name, "input"]).detach() for name in "ab")
    assert_close(found["similarity"], (z * other).sum(-1))


def test_gradient_times_input_is_the_product_with_the_hessian() -> None:
    net, td = encoder(), two(1)
    found = BiLRP(GradientTimesInput(), A, B).wrap(Pair(net))(td.clone())[PAIR][0]
    x, other = td["a", "input"][0], td["b", "input"][0]

    def similarity(x: Tensor, other: Tensor) -> Tensor:
        return (net(x) * net(other)).sum()

    hessian = torch.autograd.functional.hessian(similarity, (x, other))[0][1]
    assert_close(found, x[:, None] * other[None] * hessian)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("method", [LRP("deeplift"), LRP("attn_lrp"), GradientTimesInput()], ids=repr)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_pairs_add_up_to_the_similarity(method: Any, similarity: Any, batch: tuple[int, ...]) -> None:
    net, td = encoder(), two(*batch)
    explained = BiLRP(method, A, B, similarity=similarity).wrap(Pair(net))
    found = explained(td.clone())
    assert found[PAIR].shape == (*batch, 4, 4)
    z, other = (net(td[name, "input"]).detach() for name in "ab")
    expected = (z * other).sum(-1) if similarity == "dot" else F.cosine_similarity(z, other, dim=-1)
    assert_close(found["similarity"], expected)
    assert_close(found[PAIR].sum((-1, -2)), expected)
    half = found[PAIR] / 2
    assert_close(found["attr", "a", "input"], half.sum(-1))
    assert_close(found["attr", "b", "input"], half.sum(-2))
    assert set(explained.out_keys) >= {PAIR, "similarity", ("attr", "a", "input"), ("attr", "b", "input")}
    assert torch.equal(found[A], z)


def test_features_have_what_the_product_gives_them() -> None:
    actor, td = critic(), transitions(5)
    product = Computed(lambda outputs, inputs: (outputs["phi"] * outputs["psi"]).sum(-1))
    whole = LRP("deeplift", target=product).wrap(actor)(td.clone())
    found = BiLRP(LRP("deeplift"), "phi", "psi").wrap(actor)(td.clone())
    for key in ("state", "action", "goal"):
        assert_close(found["attr", key], whole["attr", key])


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_two_towers_of_one_model(batch: tuple[int, ...]) -> None:
    actor, td = critic(), transitions(*batch)
    found = BiLRP(LRP("deeplift"), "phi", "psi").wrap(actor)(td.clone())
    assert set(found["pairs"].keys(True, True)) == {("state", "goal"), ("action", "goal")}
    assert found["pairs", "state", "goal"].shape == (*batch, 3, 2)
    total = found["pairs", "state", "goal"].sum((-1, -2)) + found["pairs", "action", "goal"].sum((-1, -2))
    assert_close(total, found["similarity"])
    swapped = BiLRP(LRP("deeplift"), "psi", "phi").wrap(actor)(td.clone())
    assert_close(swapped["pairs", "goal", "state"], found["pairs", "state", "goal"].mT)
    assert_close(swapped["attr", "state"], found["attr", "state"])


def test_self_similarity() -> None:
    net = encoder()
    td = two(3)["a"]
    found = BiLRP(LRP("deeplift"), "output").wrap(net)(td.clone())
    matrix = found["pairs", "input", "input"]
    assert_close(matrix, matrix.mT)
    assert_close(matrix.sum((1, 2)), net(td["input"]).square().sum(-1).detach())
    assert_close(found["attr", "input"].sum(1), found["similarity"])
    twin = TensorDict({"a": td.clone(), "b": td.clone()}, [3])
    assert_close(matrix, BiLRP(LRP("deeplift"), A, B).wrap(Pair(net))(twin)[PAIR])


def test_an_input_of_both_towers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 5, bias=False), nn.Linear(5, 5, bias=False)

        def forward(self, state: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(state), self.other(torch.cat([state, goal], -1))

    torch.manual_seed(0)
    actor = TensorDictModule(Both().double(), ["state", "goal"], ["phi", "psi"])
    td = transitions(4)
    found = BiLRP(GradientTimesInput(), "phi", "psi").wrap(actor)(td.clone())
    assert set(found["pairs"].keys(True, True)) == {("state", "state"), ("state", "goal")}
    total = found["attr", "state"].sum(-1) + found["attr", "goal"].sum(-1)
    assert_close(total, found["similarity"])


def test_tokens() -> None:
    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(20, 6), nn.Linear(6, 8, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            mean: Tensor = torch.relu(self.mix(self.words(ids))).mean(-2)
            return mean

    torch.manual_seed(0)
    net = Sentence().double()
    td = TensorDict({"a": {"ids": torch.randint(20, (3, 5))}, "b": {"ids": torch.randint(20, (3, 7))}}, [3])
    model = Pair(TensorDictModule(net, ["ids"], ["z"]))
    method = LRP("deeplift", use_inputs=False, input_modules=["words"])
    whole = BiLRP(method, ("a", "z"), ("b", "z")).wrap(model)(td.clone())
    assert whole["pairs", "words", "words:1"].shape == (3, 5, 6, 7, 6)
    for summed in (-1, 2, [2, -1]):
        found = BiLRP(method, ("a", "z"), ("b", "z"), summed=summed).wrap(model)(td.clone())
        assert found["pairs", "words", "words:1"].shape == (3, 5, 7)
        assert_close(found["pairs", "words", "words:1"], whole["pairs", "words", "words:1"].sum((2, 4)))
        assert_close(found["pairs", "words", "words:1"].sum((1, 2)), found["similarity"])
        assert_close(found["attr", "words"], whole["attr", "words"])
    assert found["attr", "words:1"].shape == (3, 7, 6)
    nothing = BiLRP(method, ("a", "z"), ("b", "z"), summed=(1, 2)).wrap(model)(td.clone())
    assert_close(nothing["pairs", "words", "words:1"], nothing["similarity"])


def test_a_few_dimensions_at_a_time() -> None:
    actor, td = critic(), transitions(5)
    whole = BiLRP(LRP("epsilon"), "phi", "psi").wrap(actor)(td.clone())
    for budget in (0, 5 * 7 * 8 * 2 * 4):
        found = BiLRP(LRP("epsilon", memory_budget=budget), "phi", "psi").wrap(actor)(td.clone())
        for key in whole.keys(True, True):
            assert_close(found[key], whole[key])


def test_a_model_that_counts_its_runs_is_run_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().train()
    td = two(8)["a"]
    method = LRP("epsilon", memory_budget=0)
    BiLRP(method, "output").wrap(net)(td.clone())
    assert int(net[1].num_batches_tracked) == 1


def test_elements_that_depend_on_each_other_have_no_pairs_of_one() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(0)).tanh()

    net, td = Centred(), two(5)["a"]
    for method in (LRP("epsilon"), GradientTimesInput()):
        with pytest.raises(
            ValueError, match=r"depend on each other along its axis 0.*explain elements one by one"
        ):
            BiLRP(method, "output").wrap(net)(td.clone())
        BiLRP(method, "output").wrap(net)(td[:1].clone())


def test_as_one_graph() -> None:
    actor, td = critic(), transitions(5)
    eager = BiLRP(LRP("epsilon"), "phi", "psi").wrap(actor)(td.clone())
    compiled = BiLRP(LRP("epsilon", compile={"backend": "aot_eager"}), "phi", "psi").wrap(actor)(td.clone())
    for key in eager.keys(True, True):
        assert_close(compiled[key], eager[key])


@pytest.mark.parametrize("at_once", [2, 5])
def test_a_buffer_explains_parts_as_the_whole(at_once: int) -> None:
    pytest.importorskip("torchrl")
    from tdhook.rl import Explain

    actor, td = critic(), transitions(5)
    method = BiLRP(LRP("epsilon"), "phi", "psi", similarity="cosine")
    whole = method.wrap(actor)(td.clone())
    found = Explain(method, actor, at_once=at_once)(td.clone())
    for key in (("pairs", "state", "goal"), ("pairs", "action", "goal"), ("attr", "goal")):
        assert_close(found[key], whole[key])


def test_elements_that_are_padding_have_no_pairs() -> None:
    actor, td = critic(), transitions(4)
    td["there"] = torch.tensor([True, False, True, True])
    method = BiLRP(LRP("epsilon"), "phi", "psi")
    found = method.explaining(InHindsight(method.seeder, "there")).wrap(actor)(td.clone())
    whole = method.wrap(actor)(td.clone())
    there = td["there"].double()
    pairs = whole["pairs", "state", "goal"] * there.reshape(-1, 1, 1)
    assert_close(found["pairs", "state", "goal"], pairs)
    assert_close(found["attr", "goal"], whole["attr", "goal"] * there.unsqueeze(-1))


def test_other_options_of_all_methods() -> None:
    method = BiLRP(LRP("deeplift"), "phi", "psi", similarity="cosine")
    asked = method.asked(attribution_key="relevance", values=True, attribute=["state", "goal"])
    assert asked.similarity == "cosine" and asked.method.attribution_key == "relevance"
    found = asked.wrap(critic())(transitions(5))
    assert set(found["pairs"].keys(True, True)) == {("state", "goal")}
    assert found["relevance", "state"].shape == found["value", "state"].shape == (5, 3)
    assert repr(method) == f"BiLRP({LRP('deeplift')!r}, 'phi', 'psi')"
    assert method.explaining(method.target).first == "phi"


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "a baseline": (
        lambda: BiLRP(IntegratedGradients(), "phi"),
        TypeError,
        "compares with a reference: similarities are explained by methods that explain the value",
    ),
    "a ledger": (
        lambda: BiLRP(LRP("epsilon", ledger=True), "phi"),
        ValueError,
        "writes more than relevance, which pairs have not: leave out ledger",
    ),
    "similarity": (
        lambda: BiLRP(LRP("epsilon"), "phi", similarity="euclid"),  # type: ignore[arg-type]
        ValueError,
        "similarity is 'dot' or 'cosine', got 'euclid'",
    ),
    "the batch": (
        lambda: BiLRP(LRP("epsilon"), "phi", summed=0),
        ValueError,
        "summed=0 is the axis of the batch: the first axis of the features is 1, the last is -1",
    ),
    "an axis": (
        lambda: BiLRP(LRP("epsilon"), "phi", "psi", summed=2).wrap(critic())(transitions(5)),
        ValueError,
        "summed=2 is no axis of 'state', whose features are of shape [3]",
    ),
    "another key": (
        lambda: BiLRP(LRP("epsilon"), "phi", "chi").wrap(critic())(transitions(5)),
        KeyError,
        "the target names 'chi', which the module did not write",
    ),
    "no vector": (
        lambda: BiLRP(LRP("epsilon"), "output").wrap(nn.Unflatten(1, (2, 2)))(two(5)["a"]),
        ValueError,
        "'output' is of shape [5, 2, 2], and a pair of embeddings is of two vectors of one length, [5, 'dimensions']",
    ),
    "taken": (
        lambda: BiLRP(LRP("epsilon"), "phi", "psi", key="phi").wrap(critic())(transitions(5)),
        ValueError,
        "the module writes 'phi' itself",
    ),
    "another target": (
        lambda: BiLRP(LRP("epsilon"), "phi", "psi").explaining(Target("phi", 0)),
        TypeError,
        "explains a similarity, and no Target(key='phi', index=0): name the embeddings, first and second",
    ),
    "too large": (
        lambda: BiLRP(GradientTimesInput(), "output").wrap(nn.Linear(50_000, 2))(
            TensorDict({"input": torch.rand(2, 50_000)}, [2])
        ),
        ValueError,
        "pairs of 'input' and 'input' would take 19 GiB: sum over axes of the features by summed=, explain a layer",
    ),
    "averaged": (
        lambda: Averaged(BiLRP(LRP("epsilon"), "phi"), Noise(0.1, 2)),
        ValueError,
        "besides relevance",
    ),
}


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors(name: str) -> None:
    made, kind, message = ERRORS[name]
    with pytest.raises(kind, match=re.escape(message)):
        made()


def test_half_precision_is_summed_in_single() -> None:
    actor, td = critic().bfloat16(), transitions(5).to(torch.bfloat16)
    found = BiLRP(LRP("attn_lrp"), "phi", "psi").wrap(actor)(td.clone())
    assert found["pairs", "state", "goal"].dtype is torch.float32
    assert found["attr", "state"].dtype is torch.bfloat16
    total = sum(value.sum((-1, -2)) for value in found["pairs"].values(True, True))
    torch.testing.assert_close(total, found["similarity"].float(), rtol=0.05, atol=0.05)


def test_an_input_of_one_number() -> None:
    model = TensorDictModule(lambda x: torch.stack([x, 2 * x], -1), ["x"], ["z"])
    found = BiLRP(GradientTimesInput(), "z").wrap(model)(TensorDict({"x": torch.randn(3).double()}, [3]))
    assert_close(found["pairs", "x", "x"], found["similarity"])


def test_an_embedding_that_depends_on_nothing() -> None:
    actor = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), ["state"], ["phi"]),
        TensorDictModule(lambda goal: goal.detach() * 2, ["goal"], ["psi"]),
    )
    td = TensorDict({"state": torch.randn(2, 3), "goal": torch.randn(2, 4)}, [2])
    with pytest.raises(ValueError, match="'psi' does not depend on any attributed input"):
        BiLRP(LRP("epsilon"), "phi", "psi").wrap(actor)(td)
