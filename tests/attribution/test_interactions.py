"""Interactions: the index of each pair, written out."""

from __future__ import annotations

import pytest
import torch
from enumerated import interaction, worth_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import References, Target
from tdhook.attribution import PredDiff, Shapley, ShapleyInteraction


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(*batch, 5).double()}, list(batch))


@pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
def test_the_enumeration(batch) -> None:
    net, td = mlp(), observations(*batch)
    found = ShapleyInteraction(Target("output", "all"), ledger=True).wrap(net)(td.clone())
    assert found["interaction"].shape == (*batch, 3, 5, 5)
    for output in range(3):
        worth = worth_of(
            lambda z, k=output: net(z)[..., k], td["input"], torch.zeros(5).double(), torch.arange(5)
        )
        matrix = found["interaction"].select(len(batch), output)
        for i, j in ((0, 1), (3, 2), (4, 0)):
            torch.testing.assert_close(matrix[..., i, j], interaction(worth, 5, i, j).detach())
            torch.testing.assert_close(matrix[..., j, i], matrix[..., i, j])
    values = Shapley(Target("output", "all")).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found["attr", "input"], values)
    torch.testing.assert_close(found["interaction"].diagonal(dim1=-2, dim2=-1), values)


def test_keys() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return (a.sum(-1) * b.sum(-1) + c.sum(-1)).unsqueeze(-1)

    module = TensorDictModule(Product(), ["a", "b", "c"], ["output"])
    td = TensorDict({key: torch.rand(4, 2) for key in "abc"}, [4])
    explained = ShapleyInteraction(features="whole").wrap(module)
    assert "interaction" in explained.out_keys
    found = explained(td.clone())["interaction"]
    torch.testing.assert_close(found[:, 0, 1], td["a"].sum(-1) * td["b"].sum(-1))
    assert found[:, 2, :2].abs().max() < 1e-6


def test_two_features() -> None:
    net, td = mlp(), observations(3)
    groups = torch.tensor([0, 0, 1, 1, 1])
    found = ShapleyInteraction(Target("output", 0), features=groups).wrap(net)(td.clone())["interaction"]
    worth = worth_of(lambda z: net(z)[:, 0], td["input"], torch.zeros(5).double(), groups)
    torch.testing.assert_close(found[:, 0, 1], interaction(worth, 2, 0, 1).detach())


def test_what_is_lost_with_other_data() -> None:
    """One by one and in pairs, on the mean over values that are drawn."""
    net, td = mlp(), observations(3)
    data = TensorDict({"input": torch.randn(9, 5).double()}, [9])
    found = PredDiff(Target("output", "all"), baseline=data, samples=4).wrap(net)(td.clone())
    assert found["interaction"].shape == (3, 3, 5, 5)
    drawn = References("sample", samples=4, data=data).of({"input": td["input"]}, {"input": 1}, td)
    lost = torch.zeros(5, 5, 3).double()
    everyone = frozenset(range(5))
    for one in drawn:
        worth = worth_of(lambda z: net(z)[:, 1].detach(), td["input"], one.replaced["input"], torch.arange(5))
        for i in range(5):
            for j in range(5):
                lost[i, j] += (worth(everyone) - worth(everyone - {i, j})) / 4
    alone = lost.diagonal().T
    torch.testing.assert_close(found["attr", "input"][:, 1], alone.T)
    expected = alone.unsqueeze(0) + alone.unsqueeze(1) - lost
    torch.testing.assert_close(found["interaction"][:, 1], expected.movedim(-1, 0))


def test_pairs_are_those_of_the_product() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[..., 0] * x[..., 1] + x[..., 2]).unsqueeze(-1)

    td = TensorDict({"input": torch.rand(4, 3)}, [4])
    found = PredDiff(baseline=0.0).wrap(Product())(td)["interaction"]
    torch.testing.assert_close(found[:, 0, 1], td["input"][:, 0] * td["input"][:, 1])
    assert found[:, 2, :2].abs().max() < 1e-6
    drawn = PredDiff().wrap(Product())(td.clone())
    assert drawn["interaction"].shape == (4, 3, 3)


def test_mistakes() -> None:
    net, td = mlp(), observations(3)
    with pytest.raises(ValueError, match="interactions are those of two features or more, and there is one"):
        ShapleyInteraction(Target("output", 0), features="whole").wrap(net)(td.clone())
    with pytest.raises(
        ValueError, match="what is attributed depends on each other, and interactions are those of"
    ):
        ShapleyInteraction(Target("output", 0), input_modules=["0"]).wrap(net)(td.clone())
    with pytest.raises(ValueError, match="interactions are none of a single element"):
        ShapleyInteraction(Target("output", 0), batch_dims=0).wrap(net)(td.clone())
