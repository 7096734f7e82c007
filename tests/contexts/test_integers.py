"""Integers: a model that makes numbers of them has relevance there; one that looks something up by them has none."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.transforms import ToTensorImage

from tdhook import LRP, Target
from tdhook.attribution import (
    Averaged,
    Gradient,
    GradientTimesInput,
    IntegratedGradients,
    Noise,
    Occlusion,
    Shapley,
)

FRAMES = torch.arange(4 * 3 * 6 * 6).mul(37).remainder(256).reshape(4, 3, 6, 6).to(torch.uint8)


def copied(x):
    numbers = torch.zeros(x.shape)
    numbers.copy_(x)
    return numbers / 255


def assigned(x):
    numbers = torch.zeros(x.shape)
    numbers[:] = x
    return numbers / 255


def checked(x):
    assert x.dtype is torch.uint8
    return x / 255


SCALED = {
    "float": lambda x: x.float() / 255,
    "division": lambda x: x / 255,
    "to": lambda x: x.to(torch.float32).div(255),
    "type": lambda x: x.type(torch.FloatTensor) / 255,
    "product": lambda x: x * torch.tensor(1 / 255),
    "centred": lambda x: (x.float() - 127) / 127,
    "double": lambda x: (x.double() / 255).float(),
    "by way of long": lambda x: x.long() / 255,
    "flipped first": lambda x: torch.cat([x.flip(-1)], 1).float() / 255,
    "stacked first": lambda x: torch.stack(x.unbind(1), 1).float() / 255,
    "difference": lambda x: (x.short() - x.flip(0).short()) / 255,
    "selected": lambda x: torch.where(x > 100, x, 0).float() / 255,
    "copied": copied,
    "assigned": assigned,
    "checked": checked,
}


class Network(nn.Module):
    def __init__(self, scaled):
        super().__init__()
        torch.manual_seed(0)
        self.scaled = scaled
        self.convolution, self.last = nn.Conv2d(3, 4, 3), nn.Linear(64, 2)

    def forward(self, x):
        return self.last(self.convolution(self.scaled(x)).relu().flatten(-3))


def actor(scaled):
    return TensorDictModule(Network(scaled), ["pixels"], ["q"])


def frames(pixels=FRAMES):
    return TensorDict({"pixels": pixels.clone()}, [4])


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat"])
@pytest.mark.parametrize("scaled", SCALED)
def test_frames_that_are_scaled_inside(scaled, composite):
    """Outputs stay what they were, bit for bit, and relevance is that of frames that were numbers before."""
    model = actor(SCALED[scaled])
    lrp = LRP(composite, target=Target("q", 0), ledger=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        td = lrp.wrap(model)(frames())
    assert torch.equal(td["q"], model(frames())["q"]) and torch.equal(td["pixels"], FRAMES)
    assert td["attr", "pixels"].shape == FRAMES.shape and td["attr", "pixels"].dtype is torch.float32
    assert td["ledger", "gap"].abs().max() < 1e-5
    if scaled not in ("checked", "difference", "by way of long"):
        expected = lrp.wrap(model)(frames(FRAMES.float()))
        torch.testing.assert_close(td["attr", "pixels"], expected["attr", "pixels"])


def test_frames_of_which_the_network_moves_the_channels():
    transform = ToTensorImage()
    td = TensorDict({"pixels": FRAMES.movedim(1, -1).contiguous()}, [4])
    written = LRP("epsilon", target=Target("q", 0), ledger=True).wrap(actor(transform._apply_transform))(td)
    expected = LRP("epsilon", target=Target("q", 0)).wrap(actor(lambda x: x / 255))(frames())
    torch.testing.assert_close(written["attr", "pixels"].movedim(-1, 1), expected["attr", "pixels"])


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_any_batch(batch):
    td = TensorDict({"pixels": FRAMES[:1].expand(max(1, TensorDict({}, batch).numel()), 3, 6, 6)}, [])
    td = TensorDict({"pixels": td["pixels"].reshape(*batch, 3, 6, 6).contiguous()}, batch)
    written = LRP("epsilon", target=Target("q", "all")).wrap(actor(SCALED["division"]))(td)
    assert written["attr", "pixels"].shape == (*batch, 2, 3, 6, 6)


def test_other_methods():
    model = actor(SCALED["division"])
    td = GradientTimesInput(target=Target("q", 0)).wrap(model)(frames())
    expected = GradientTimesInput(target=Target("q", 0)).wrap(model)(frames(FRAMES.float()))
    torch.testing.assert_close(td["attr", "pixels"], expected["attr", "pixels"])
    td = IntegratedGradients(target=Target("q", 0), steps=8).wrap(model)(frames())
    expected = IntegratedGradients(target=Target("q", 0), steps=8).wrap(model)(frames(FRAMES.float()))
    torch.testing.assert_close(td["attr", "pixels"], expected["attr", "pixels"])


def test_compiled():
    lrp = LRP("epsilon", target=Target("q", 0))
    compiled = LRP("epsilon", target=Target("q", 0), compile={"backend": "eager"})
    expected = lrp.wrap(actor(SCALED["division"]))(frames())
    written = compiled.wrap(actor(SCALED["division"]))(frames())
    torch.testing.assert_close(written["attr", "pixels"], expected["attr", "pixels"])


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        return self.layer(x.float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8, torch.bool])
def test_where_there_is_nothing_else_any_integers_count(dtype):
    td = TensorDict({"input": torch.eye(6).to(dtype)}, [6])
    assert LRP("epsilon", target=Target("output", 0)).wrap(Linear())(td)["attr", "input"].shape == (6, 6)


def test_large_integers_are_exact():
    x = torch.tensor([[2**24 + 1, 1, 2, 3, 4, 5]])
    td = LRP("epsilon", target=Target("output", 0)).wrap(Linear())(TensorDict({"input": x}, [1]))
    assert td["attr", "input"].dtype is torch.float64


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.vector, self.goal = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, vector, goal, mask):
        return self.vector(vector) * mask.float() + self.goal(goal.float())


@pytest.mark.filterwarnings("ignore:input 'mask'")
def test_beside_numbers_those_that_are_named():
    """A mask beside numbers is no feature: in a product it would take a share of what the feature has."""
    model = TensorDictModule(Mixed(), ["vector", "goal", "mask"], ["q"])
    td = TensorDict(
        {
            "vector": torch.ones(5, 4),
            "goal": torch.ones(5, 3, dtype=torch.int64),
            "mask": torch.ones(5, 1) > 0,
        },
        [5],
    )
    with pytest.warns(UserWarning, match="input 'goal' is torch.int64, which has no gradient"):
        written = LRP("epsilon", target="q").wrap(model)(td.copy())
    assert set(written["attr"].keys()) == {"vector"}
    with pytest.warns(UserWarning, match="input 'mask' is torch.bool"):
        written = LRP("epsilon", target="q", attribute=["vector", "goal"], ledger=True).wrap(model)(td.copy())
    assert set(written["attr"].keys()) == {"vector", "goal"} and written["ledger", "gap"].abs().max() < 1e-5


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens, mask):
        return self.last((self.embedding(tokens.long()) * mask.float().unsqueeze(-1)).sum(-2))


@pytest.mark.filterwarnings("ignore:input 'mask'")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_indices_have_none(dtype):
    model = TensorDictModule(Reader(), ["tokens", "mask"], ["q"])
    td = TensorDict(
        {"tokens": torch.ones(5, 3, dtype=dtype), "mask": torch.ones(5, 3, dtype=torch.int64)}, [5]
    )
    text = r"none of the inputs \('tokens', 'mask'\) is floating-point, so none can have relevance; name the module"
    with pytest.warns(UserWarning, match="input 'tokens' is"), pytest.raises(ValueError, match=text):
        LRP("epsilon", target="q").wrap(model)(td.copy())
    options = {"use_inputs": False, "input_modules": ["module.embedding"]}
    written = LRP("epsilon", target="q", **options).wrap(model)(td.copy())
    assert written["attr", "module.embedding"].shape == (5, 3, 4)


@pytest.mark.parametrize(
    "scaled",
    [lambda x: torch.from_numpy(x.numpy()) / 255, lambda x: (x - x.flip(0)).float()],
    ids=["numpy", "wraps"],
)
def test_numbers_that_cannot_be_followed(scaled):
    with (
        pytest.warns(UserWarning, match="input 'pixels' is torch.uint8"),
        pytest.raises(ValueError, match="or give the numbers that are made of them"),
    ):
        LRP("epsilon", target=Target("q", 0)).wrap(actor(scaled))(frames())


def test_numbers_beside_a_mask_are_to_be_named() -> None:
    class Masked(nn.Module):
        def forward(self, board: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
            return (board.float() * 2).masked_fill(~legal, -torch.inf)

    model = TensorDictModule(Masked(), ["board", "legal"], ["logits"])
    entries = {"board": torch.tensor([[1, 0, -1]]), "legal": torch.tensor([[True, True, False]])}
    td = TensorDict(entries, [1])
    with (
        pytest.warns(UserWarning, match="input 'legal' is torch.bool"),
        pytest.raises(ValueError, match=r"name those that are numbers.*attribute=\['board'\]"),
    ):
        LRP("epsilon", target=Target("logits", 0)).wrap(model)(td.copy())
    with pytest.warns(UserWarning, match="input 'legal' is torch.bool"):
        found = LRP("epsilon", target=Target("logits", 0), attribute=["board"]).wrap(model)(td.copy())
    assert found["attr", "board"].tolist() == [[2.0, 0.0, 0.0]]


class Looking(nn.Module):
    """Looks something up by words, and may see numbers too."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, words, x=0.0):
        return self.last(self.words(words) + x)


@pytest.mark.filterwarnings("ignore:input 'words' is torch.int64, which has no gradient")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside numbers"])
@pytest.mark.parametrize(
    "method",
    [
        Gradient(),
        LRP("epsilon"),
        LRP("deeplift", baseline=0.0),
        IntegratedGradients(),
        Occlusion(window=1),
        Shapley(),
        Averaged(Gradient(), Noise(0.1, 2)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_indices_that_are_all_that_is_named_are_told(method, beside):
    keys = ["words", "x"] if beside else ["words"]
    model = TensorDictModule(Looking(), keys, ["logits"])
    td = TensorDict({"words": torch.randint(9, (3,)), "x": torch.randn(3, 4)}, [3])
    asked = method.asked(target=Target("logits", 0), attribute=["words"])
    with pytest.raises(ValueError, match=r"none of the inputs \('words'\) is floating-point.* input_modules"):
        asked.wrap(model)(td)
    if not isinstance(asked, Averaged):  # which has nothing to change there
        found = asked.asked(input_modules=["module.words"]).wrap(model)(td)["attr"]
        assert set(found.keys()) == {"module.words"}
