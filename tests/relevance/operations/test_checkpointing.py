"""Models that save memory by running parts of themselves once more are explained like others."""

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target

from .checks import either_ledger, every_flow


class Block(nn.Module):
    """Attention and a gated network."""

    overwrites = False

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.act = nn.ReLU(inplace=self.overwrites)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        attended = torch.softmax(q @ k.mT, -1) @ v
        z = self.out(attended)
        if self.overwrites:
            z += x
        else:
            z = z + x
        return self.act(z) * torch.sigmoid(z)


class OverwritingBlock(Block):
    """The same; here what overwrites is run with care, and everything is kept."""

    overwrites = True


class Checkpointed(nn.Module):
    def __init__(self, block, variant):
        super().__init__()
        self.block, self.variant = block, variant

    def forward(self, x):
        if self.variant is None:
            return self.block(x)
        return checkpointing.checkpoint(self.block, x, use_reentrant=self.variant == "reentrant")


def explained(variant, preset, ledger=False, block=Block, **options):
    torch.manual_seed(0)
    blocks = [Checkpointed(block(), variant) for _ in range(3)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(40, 3)).double()
    td = TensorDict({"input": torch.randn(2, 5, 8, dtype=torch.float64)}, batch_size=[2])
    method = LRP(preset, target=Target("output", "argmax"), ledger=ledger, **options)
    with method.prepare(net) as module:
        module(td)
    return td, module


@pytest.mark.parametrize("variant", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("preset", ["attn_lrp", "epsilon_plus"])
@pytest.mark.parametrize("block", [Block, OverwritingBlock])
@every_flow
@either_ledger
def test_checkpointed_equals_plain(variant, preset, block, flow, ledger):
    plain, module = explained(None, preset, flow=flow, ledger=ledger, block=block)
    calls = sum(entry.calls for entry in module.ledger.summary()) if ledger else 0
    got, module = explained(variant, preset, flow=flow, ledger=ledger, block=block)
    torch.testing.assert_close(got["attr", "input"], plain["attr", "input"], rtol=0, atol=0)
    if ledger:
        assert got["ledger", "gap"].abs().max() < 1e-12
        assert sum(entry.calls for entry in module.ledger.summary()) == calls


def test_torch_has_its_own_back():
    before = vars(checkpointing).copy()
    explained("reentrant", "attn_lrp")
    assert vars(checkpointing) == before
    x = torch.randn(3, requires_grad=True)
    checkpointing.checkpoint(torch.tanh, x, use_reentrant=True).sum().backward()
    torch.testing.assert_close(x.grad, 1 - torch.tanh(x.detach()) ** 2)


def test_less_is_kept():
    """What is kept of a checkpointed block is its input, and not what its rules read."""

    def kept(variant):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            explained(variant, "attn_lrp")
        return sum(sizes)

    assert kept("not reentrant") < kept(None)
