"""Networks whose units are known by construction: relevance names the unit that carries the decision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Key, Target
from tdhook.attribution import GradientTimesInput, IntegratedGradients
from tdhook.selectors import Op
from tdhook.targets import Contrast, Through

EPISODES = 300
SPRITE = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
METHODS = {
    "deeplift": LRP("deeplift", baseline=0.0),
    "epsilon_plus": LRP("epsilon_plus"),
    "integrated gradients": IntegratedGradients(steps=8),
}


class Detector(nn.Module):
    """Goes to where the sprite is. Channel 3 finds it; the others are textures, which are larger and say little.

    ``[batch, 1, 12, 24] -> [batch, 2]``, the left half and the right one.
    """

    UNIT = 3

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.look = nn.Conv2d(1, 8, 3, bias=True)
        self.answer = nn.Linear(16, 2, bias=False)
        with torch.no_grad():
            self.look.weight.copy_(torch.rand(8, 1, 3, 3, generator=generator))
            self.look.weight[self.UNIT, 0] = SPRITE
            self.look.bias.fill_(0.0)
            self.look.bias[self.UNIT] = -4.0  # of the five that a whole sprite gives
            self.answer.weight.copy_(0.002 * torch.randn(2, 16, generator=generator))
            self.answer.weight[:, self.UNIT] = torch.tensor([1.0, -1.0])
            self.answer.weight[:, 8 + self.UNIT] = torch.tensor([-1.0, 1.0])

    def forward(self, x):
        seen = F.relu(self.look(x))
        left, right = (half.flatten(2).amax(-1) for half in seen.chunk(2, -1))
        return self.answer(torch.cat([left, right], -1))


def frames(count):
    """Noise, and a sprite on one side of it."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.rand(count, 1, 12, 24, generator=generator)
    side = torch.randint(0, 2, (count,), generator=generator)
    row = torch.randint(0, 9, (count,), generator=generator)
    column = torch.randint(0, 8, (count,), generator=generator) + 13 * side
    for i in range(count):
        x[i, 0, row[i] : row[i] + 3, column[i] : column[i] + 3] = (SPRITE + 1) / 2
    return TensorDict({"pixels": x, "side": side}, [count])


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_unit_that_sees_the_sprite(method):
    td = frames(EPISODES)
    policy = TensorDictModule(Detector(), ["pixels"], ["scores"])
    assert (policy(td.clone())["scores"].argmax(-1) == td["side"]).double().mean() > 0.99
    why = Contrast(Target("scores", "argmax"), Target("scores", Key("other")))
    td["other"] = 1 - td["side"]
    found = method.explaining(Through(why, Op("relu"), "top:1", axis=1)).wrap(policy)(td.clone())
    right = (found["units", "Op('relu')"].squeeze(-1) == Detector.UNIT).double().mean()
    assert right > 0.99
    # What passes it lies on the sprite, but for what the edges of frames around it have.
    map_ = found["attr", "pixels"].squeeze(1).abs().sum(1)
    peak = map_.flatten(1).argmax(-1)
    on = torch.zeros_like(map_)
    for i, x in enumerate(td["pixels"][:, 0]):
        found_at = F.conv2d(x[None, None], SPRITE[None, None]).flatten().argmax()
        r, c = divmod(int(found_at), 22)
        on[i, r : r + 3, c : c + 3] = 1
    assert (on.flatten(1).gather(1, peak.unsqueeze(1)) == 1).double().mean() > 0.99


class Copying(nn.Module):
    """Attention of four heads; head 2 copies the cue to the end, the others mix what the end does not ask for.

    ``[batch, tokens, 9] -> [batch, 4]``; the first eight features are the token, the last one marks the cue.
    """

    HEAD, HEADS = 2, 4

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.query, self.key = (
            nn.Parameter(0.3 * torch.randn(4, 9, 2, generator=generator)) for _ in range(2)
        )
        self.value = nn.Parameter(torch.randn(4, 9, 4, generator=generator))
        self.out = nn.Parameter(0.02 * torch.randn(4, 4, 4, generator=generator))
        with torch.no_grad():
            self.query[self.HEAD] = 0.0
            self.query[self.HEAD, 4:8] = 6.0  # of any token at the end
            self.key[self.HEAD] = 0.0
            self.key[self.HEAD, 8] = 3.0
            self.value[self.HEAD] = 0.0
            self.value[self.HEAD, :4] = torch.eye(4)
            self.out[self.HEAD] = 3 * torch.eye(4)

    def forward(self, x):
        q, k, v = (torch.einsum("btf,hfd->bhtd", x, w) for w in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q[:, :, -1:], k, v).squeeze(2)
        return torch.einsum("bhd,hdo->bo", mixed, self.out)


def sequences(count):
    """Tokens of which one is marked: which of four it is, is the answer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(count, 7, 9)
    token = torch.randint(0, 4, (count, 7), generator=generator)
    x.scatter_(-1, token.unsqueeze(-1), 1.0)
    x[:, -1, :8] = F.one_hot(torch.randint(4, 8, (count,), generator=generator), 8).float()
    cue = torch.randint(0, 6, (count,), generator=generator)
    x[torch.arange(count), cue, 8] = 1.0
    answer = token[torch.arange(count), cue]
    return TensorDict({"tokens": x, "cue": cue, "answer": answer}, [count])


@pytest.mark.parametrize("method", [LRP("attn_lrp"), LRP("cp_lrp"), GradientTimesInput()], ids=str)
def test_the_head_that_copies_the_cue(method):
    td = sequences(EPISODES)
    policy = TensorDictModule(Copying(), ["tokens"], ["scores"])
    assert (policy(td.clone())["scores"].argmax(-1) == td["answer"]).double().mean() > 0.99
    place = Op("scaled_dot_product_attention")
    target = Through(Target("scores", "argmax"), place, "top:1", axis=1)
    found = method.explaining(target).wrap(policy)(td.clone())
    assert (found["units", repr(place)].squeeze(-1) == Copying.HEAD).double().mean() > 0.99
    by_token = found["attr", "tokens"].squeeze(1)[..., :4].abs().sum(-1)
    assert (by_token.argmax(-1) == td["cue"]).double().mean() > 0.99
