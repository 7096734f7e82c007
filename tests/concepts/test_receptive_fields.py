"""What a place in a layer depends on is found without knowing the model."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook.concepts.receptive_fields import box_of, receptive_fields


class Residual(nn.Module):
    """A block that adds its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


def places(layer: Tensor, at: list[tuple[int, int, int]]) -> Tensor:
    height, width = layer.shape[2:]
    return torch.tensor([(c * height + i) * width + j for c, i, j in at])


def fields(net: nn.Module, layer: str, x: Tensor, at: list[tuple[int, int, int]], path: int) -> list[object]:
    value = net[: path + 1](x)
    td = TensorDict({"input": x}, [len(x)])
    found = receptive_fields(net, layer, td, places(value, at))
    return box_of(found["input"])[:, :, 1:].tolist()


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_convolutions_and_pooling(pool: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 5, 2), nn.Flatten(), nn.Linear(5 * 16, 2)
    )
    x = torch.randn(3, 2, 12, 12)
    at = [(0, 0, 0), (3, 1, 2), (2, 3, 3)]
    # A place of the second convolution sees 2 x 2 blocks of 2 x 2 places, each of which sees 3 x 3 pixels.
    expected = [[[2 * i, 2 * j], [2 * i + 6, 2 * j + 6]] for _, i, j in at]
    assert fields(net, "3", x, at, 3) == expected
    assert fields(net, "0", x, at, 0) == [[[i, j], [i + 3, j + 3]] for _, i, j in at]


def test_residual_blocks_and_borders() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), Residual(), Residual(), nn.Flatten(), nn.Linear(256, 2))
    x = torch.randn(2, 1, 8, 8)
    assert fields(net, "2", x, [(1, 0, 4), (2, 7, 7)], 2) == [[[0, 2], [3, 7]], [[5, 5], [8, 8]]]


def test_what_sees_everything_or_nothing() -> None:
    torch.manual_seed(0)
    dead = nn.Linear(6, 3)
    nn.init.zeros_(dead.weight)
    net = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 6), ["x"], ["hidden"]), TensorDictModule(dead, ["hidden"], ["y"])
    )
    td = TensorDict({"x": torch.randn(2, 4)}, [2])
    for layer in ("hidden", "y"):
        found = receptive_fields(net, layer, td, torch.tensor([0, 2]), is_module=False)["x"]
        assert found.all() if layer == "hidden" else not found.any()
        assert box_of(found).tolist() == [[[0], [4]], [[0], [4]]]


def test_a_unit_that_the_data_never_open() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    nn.init.constant_(net[0].bias, -3.0)
    x = torch.rand(2, 1, 8, 8)
    assert not net[:2](x).any()
    assert fields(net, "1", x, [(0, 2, 3), (1, 5, 0)], 1) == [[[2, 3], [5, 6]], [[5, 0], [8, 3]]]


class Frames(nn.Module):
    """Scales frames itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x / 255).relu().flatten(1))


def test_integers_that_a_network_makes_numbers_of() -> None:
    torch.manual_seed(0)
    x = torch.randint(256, (2, 1, 6, 6), dtype=torch.uint8)
    found = receptive_fields(Frames(), "conv", TensorDict({"input": x}, [2]), torch.tensor([1, 16 + 11]))
    assert box_of(found["input"])[:, :, 1:].tolist() == [[[0, 1], [3, 4]], [[2, 3], [5, 6]]]


class Named(nn.Module):
    """Reads an index, too."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.first, self.head = nn.Embedding(3, 2), nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, index: Tensor, x: Tensor) -> Tensor:
        return self.head(self.first(torch.cat([self.name(index), x], -1)).relu())


def test_indices_are_left_alone() -> None:
    torch.manual_seed(0)
    td = TensorDict({"index": torch.tensor([0, 2]), "x": torch.randn(2, 2)}, [2])
    with pytest.warns(UserWarning, match="'index' is torch.int64"):
        found = receptive_fields(Named(), "first", td, torch.tensor([0, 2]), in_keys=["index", "x"])
    assert list(found.keys()) == ["x"] and found["x"].all()
