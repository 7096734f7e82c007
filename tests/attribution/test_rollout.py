"""Attention rollout: products of attention weights, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import AttentionRollout


class Transformer(nn.Module):
    """Reads tokens ``[*, tokens, 8]``, and answers by the mean over them."""

    def __init__(self, batch_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.embed, self.head, self.first = nn.Linear(4, 8), nn.Linear(8, 3), batch_first
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        found = self.encoder(tokens) if self.first else self.encoder(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(found.mean(1))


def by_hand(net: Transformer, x: Tensor) -> Tensor:
    """The product, ``[batch, tokens, tokens]``."""
    tokens, found = net.embed(x), torch.eye(x.shape[1]).to(x)
    for layer in net.encoder.layers:
        query, key, _ = F.linear(tokens, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(
            3, -1
        )
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key)]
        weights = (heads[0] @ heads[1].mT / 2).softmax(-1).mean(1)
        found = (weights + torch.eye(x.shape[1]).to(x)) / 2 @ found
        tokens = layer(tokens) if net.first else layer(tokens.transpose(0, 1)).transpose(0, 1)
    return found


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(*batch, 5, 4).double()}, list(batch))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_product_written_out(batch_first, training) -> None:
    net, td = Transformer(batch_first).double().train(training), observations(3)
    expected = by_hand(net, td["input"]).detach()
    torch.testing.assert_close(expected.sum(-1), torch.ones(3, 5).double())
    for token, row in ((None, expected.mean(1)), (0, expected[:, 0]), (-1, expected[:, -1])):
        found = AttentionRollout(Target("output", 0), token=token).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(found.sum(-1), row)
        torch.testing.assert_close(found[..., 0], found[..., 3])


def test_dropout_is_left_out_and_draws_as_it_did() -> None:
    net, td = Transformer(dropout=0.5).double().train(), observations(3)
    torch.manual_seed(5)
    expected = net(td["input"])
    torch.manual_seed(5)
    found = AttentionRollout(Target("output", 0)).wrap(net)(td.clone())
    torch.testing.assert_close(found["output"], expected.detach())
    assert all(module.training for module in net.modules())


class Causal(nn.Module):
    """Attention as a function, with heads, a mask, or by itself."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.how = nn.Linear(4, 12), how

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, **self.how)
        return found.transpose(1, 2).flatten(2)[:, -1]


@pytest.mark.parametrize(
    "how",
    [
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5).tril().bool()},
        {"attn_mask": torch.zeros(5, 5)},
        {},
    ],
    ids=["causal", "truth values", "numbers", "none"],
)
def test_attention_as_a_function(how) -> None:
    how = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in how.items()
    }
    net, td = Causal(**how).double(), observations(3)
    query, key, _ = net.qkv(td["input"]).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    value = torch.eye(5).double().expand(3, 2, 5, 5)
    weights = F.scaled_dot_product_attention(query, key, value, **how).mean(1)
    found = AttentionRollout(Target("output", 0), token=1, identity=0.25).wrap(net)(td)["attr", "input"]
    expected = 0.75 * weights[:, 1] + 0.25 * torch.eye(5).double()[1]
    torch.testing.assert_close(found.sum(-1), expected.detach())


def test_tokens_of_a_module() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rest = nn.Embedding(10, 4), Transformer()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.words(x))

    net = Words().double()
    td = TensorDict({"input": torch.randint(10, (3, 5))}, [3])
    method = AttentionRollout(Target("output", 0), use_inputs=False, input_modules=["words"])
    found = method.wrap(net)(td)["attr", "words"]
    torch.testing.assert_close(found.sum(-1), by_hand(net.rest, net.words(td["input"])).mean(1).detach())


def test_a_batch_of_sequences() -> None:
    """Time is an axis of the batch."""
    net = Transformer().double()
    net.head = nn.Identity()

    class Each(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net.encoder(net.embed(x))

    td = TensorDict({"input": torch.randn(3, 5, 4).double()}, [3, 5])
    found = AttentionRollout(Target("output", 0), token=-1).wrap(Each())(td)["attr", "input"]
    torch.testing.assert_close(found.sum(-1), by_hand(net, td["input"])[:, -1].detach())


def test_mistakes() -> None:
    net, td = Transformer().double(), observations(3)
    with pytest.raises(ValueError, match=r"identity=1 is what goes past each attention: give a share from 0"):
        AttentionRollout(identity=1)
    with pytest.raises(IndexError, match="there is no token 5: sequences have 5"):
        AttentionRollout(Target("output", 0), token=5).wrap(net)(td.clone())
    with pytest.raises(
        ValueError, match=r"Sequential calls neither nn.MultiheadAttention nor F.scaled_dot_product"
    ):
        AttentionRollout(Target("output", 0)).wrap(nn.Sequential(nn.Flatten(), nn.Linear(20, 2)).double())(
            td.clone()
        )

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(torch.cat([x, x], 1))

    with pytest.raises(
        ValueError, match=r"'input' has shape \[3, 5, 4\], in which no axis is that of the 10 tokens"
    ):
        AttentionRollout(Target("output", 0)).wrap(Pooled())(td.clone())

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x + 1, x)[0].mean(1)

    with pytest.raises(ValueError, match=r"attention looks from one sequence, of shape .* at another"):
        AttentionRollout(Target("output", 0)).wrap(Across())(td.clone())
