"""Models that explanations by differences are known to be lost in: all of the difference arrives, unmodified.

Each is the smallest model of its kind: functions in place of modules, modules that are used twice, values that are
overwritten, products, branches, residuals, recurrence, and normalisation at odd places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

FLOWS = ("relevance", "gradient")
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}


pytestmark = pytest.mark.usefixtures("doubles")


def case(name: str, *shape: int):
    def register(make):
        CASES[name] = make, shape
        return make

    return register


class Model(nn.Module):
    """Calls a function with itself, and holds the modules that the function uses."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def spread(norm: nn.Module) -> nn.Module:
    """Statistics that are not those of a fresh layer."""
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


# --- Activations that are no modules, and modules that are used again ------------------------------


@case("activations are functions", 6)
def _():
    return Model(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


@case("convolution, pooling and ReLU in one expression", 1, 12, 12)
def _():
    return Model(
        lambda m, x: m.d(
            F.relu(m.c(F.relu(F.max_pool2d(m.b(F.relu(F.max_pool2d(m.a(x), 2))), 2)).flatten(1)))
        ),
        a=nn.Conv2d(1, 4, 3),
        b=nn.Conv2d(4, 6, 2),
        c=nn.Linear(24, 8),
        d=nn.Linear(8, 3),
    )


@case("log softmax at the end", 6)
def _():
    return Model(lambda m, x: F.log_softmax(m.b(F.relu(m.a(x))), dim=1), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


@case("softmax at the end", 6)
def _():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))


@case("one ReLU for all layers, in place", 6)
def _():
    return Model(
        lambda m, x: m.c(m.relu(m.b(m.relu(m.a(x))))),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, 3),
        relu=nn.ReLU(inplace=True),
    )


@case("one pooling for all layers", 1, 12, 12)
def _():
    return Model(
        lambda m, x: m.pool(m.b(m.pool(m.a(x)).sigmoid())).flatten(1),
        a=nn.Conv2d(1, 3, 3),
        b=nn.Conv2d(3, 3, 2),
        pool=nn.MaxPool2d(2),
    )


@case("one layer twice", 6)
def _():
    return Model(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(6, 6), b=nn.Linear(6, 3))


@case("one block twice on different values", 6)
def _():
    return Model(
        lambda m, x: m.head(m.block(x) - m.block(x.flip(-1))),
        block=nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4)),
        head=nn.Linear(4, 3),
    )


@case("everything is a function", 2, 8, 8)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        x = F.elu(F.conv2d(x, m.kernel.weight, m.kernel.bias, padding=1))
        x = F.dropout(F.avg_pool2d(F.max_pool2d(x, 2), 2), 0.5, m.training)
        x = F.layer_norm(torch.flatten(x, 1), (16,))
        return F.linear(F.gelu(F.linear(x, m.a.weight, m.a.bias)), m.b.weight, m.b.bias)

    return Model(function, kernel=nn.Conv2d(2, 4, 3), a=nn.Linear(16, 8), b=nn.Linear(8, 3))


# --- Products, branches and residuals --------------------------------------------------------------


@case("a product of two branches", 6)
def _():
    return Model(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(6, 3), b=nn.Linear(6, 3))


@case("a gated product", 6)
def _():
    return Model(
        lambda m, x: m.c(torch.tanh(m.a(x)) * torch.sigmoid(m.b(x))),
        a=nn.Linear(6, 8),
        b=nn.Linear(6, 8),
        c=nn.Linear(8, 3),
    )


@case("squeeze and excitation", 4, 6, 6)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        x = F.silu(m.conv(x))
        return m.head(
            (x * torch.sigmoid(m.excite(F.silu(m.squeeze(x.mean((2, 3), keepdim=True)))))).mean((2, 3))
        )

    return Model(
        function,
        conv=nn.Conv2d(4, 6, 3),
        squeeze=nn.Conv2d(6, 2, 1),
        excite=nn.Conv2d(2, 6, 1),
        head=nn.Linear(6, 3),
    )


@case("branches side by side", 6)
def _():
    return Model(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), torch.tanh(m.b(x)), x], 1)),
        a=nn.Linear(6, 4),
        b=nn.Linear(6, 4),
        c=nn.Linear(14, 3),
    )


@case("residuals", 4, 6, 6)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        x = F.relu(x + m.n2(m.c2(F.relu(m.n1(m.c1(x))))))
        x += m.c3(x)
        return m.head(x.mean((2, 3)))

    return Model(
        function,
        c1=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        n1=spread(nn.BatchNorm2d(4)),
        c2=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        n2=spread(nn.BatchNorm2d(4)),
        c3=nn.Conv2d(4, 4, 1),
        head=nn.Linear(4, 3),
    )


@case("densely connected", 6)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        for layer in (m.a, m.b, m.c):
            x = torch.cat([x, F.relu(layer(x))], 1)
        return m.head(x)

    return Model(function, a=nn.Linear(6, 2), b=nn.Linear(8, 2), c=nn.Linear(10, 2), head=nn.Linear(12, 3))


@case("a difference of two predictions", 6)
def _():
    return Model(
        lambda m, x: (m.a(x[:, :3]) - m.a(x[:, 3:])).square() / (1 + m.b(x).exp()),
        a=nn.Linear(3, 3),
        b=nn.Linear(6, 3),
    )


# --- Recurrence ------------------------------------------------------------------------------------


@case("LSTM", 5, 3)
def _():
    return Model(
        lambda m, x: m.head(m.cells(x)[0][:, -1]), cells=nn.LSTM(3, 6, batch_first=True), head=nn.Linear(6, 3)
    )


@case("layers of bidirectional GRUs", 5, 3)
def _():
    return Model(
        lambda m, x: m.head(m.cells(x)[0].mean(1)),
        cells=nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        head=nn.Linear(8, 3),
    )


@case("a cell, step by step", 5, 3)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h, c = m.cell(step, (h, c))
        return m.head(F.relu(h))

    return Model(function, cell=nn.LSTMCell(3, 4), head=nn.Linear(4, 3))


@case("convolutions along time that look back", 3, 9)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        for i, conv in enumerate(m.convs):
            y = F.pad(x, (2 * 2**i, 0))
            x = F.relu(x + F.relu(conv(y)))
        return m.head(x[..., -1])

    return Model(
        function,
        convs=nn.ModuleList(
            [nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 3, dilation=2**i)) for i in range(2)]
        ),
        head=nn.Linear(3, 3),
    )


# --- Normalisation ---------------------------------------------------------------------------------


@case("layer norm", 6)
def _():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


@case("batch norm at first, twice, and at the end", 6)
def _():
    return nn.Sequential(
        spread(nn.BatchNorm1d(6)),
        nn.Linear(6, 8),
        nn.ReLU(),
        spread(nn.BatchNorm1d(8)),
        spread(nn.BatchNorm1d(8)),
        nn.Linear(8, 3),
        spread(nn.BatchNorm1d(3)),
    )


@case("batch norm between a convolution and what flattens it", 2, 6, 6)
def _():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Flatten(), spread(nn.BatchNorm1d(64)), nn.Tanh(), nn.Linear(64, 3)
    )


@case("group norm and instance norm", 4, 6, 6)
def _():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.InstanceNorm2d(4),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@case("a transformer", 4, 6)
def _():
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Model(lambda m, x: m.head(m.encoder(x)[:, 0]), encoder=encoder, head=nn.Linear(6, 3))


# --- Other activations, and what is made of plain operations ---------------------------------------


@case("activations of every kind", 6)
def _():
    kinds = (
        nn.ELU,
        nn.LeakyReLU,
        nn.SELU,
        nn.Softplus,
        nn.GELU,
        nn.SiLU,
        nn.Hardtanh,
        nn.PReLU,
        nn.Mish,
        nn.Sigmoid,
    )
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    return nn.Sequential(*layers, nn.Linear(6, 3))


@case("an activation of one's own", 6)
def _():
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    return nn.Sequential(nn.Linear(6, 8), Swish(), nn.Linear(8, 3))


@case("distances", 6)
def _():
    return Model(
        lambda m, x: -torch.cdist(torch.tanh(m.a(x)), m.centres.weight),
        a=nn.Linear(6, 4),
        centres=nn.Linear(4, 3),
    )


@case("cosine similarity of two towers", 6)
def _():
    return Model(
        lambda m, x: F.cosine_similarity(
            m.a(x[:, :3]).unflatten(1, (3, 4)), m.b(x[:, 3:]).unflatten(1, (3, 4)), dim=-1
        ),
        a=nn.Linear(3, 12),
        b=nn.Linear(3, 12),
    )


@case("a physical formula", 6)
def _():
    def function(m: Any, x: Tensor) -> Tensor:
        angle, speed, force = m.a(x).chunk(3, -1)
        return (9.8 * angle.sin() + angle.cos() * (force - speed**2 * angle.sin()).clamp(-1, 1)) / (
            4 / 3 - 0.1 * angle.cos() ** 2
        )

    return Model(function, a=nn.Linear(6, 9))


# --- What has to hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("composite", ["deeplift", "deeplift_reveal_cancel", "deeplift_shapley"])
@pytest.mark.parametrize("name", CASES)
def test_all_of_the_difference_arrives(name: str, composite: str, flow: str) -> None:
    make, shape = CASES[name]
    model = make().eval()
    x = torch.randn(3, *shape)
    partly = torch.where(torch.rand(3, *shape) < 0.5, x, torch.randn(3, *shape))
    for start, ledger in ((partly, True), (torch.zeros(shape), False)):
        wanted = (model(x) - model(start.expand_as(x).clone())).detach()[:, 1]
        with LRP(
            composite,
            target=Target("output", 1),
            baseline=start,
            flow=flow,
            ledger=ledger,
            on_unmatched="raise",
        ).prepare(model) as run:
            td = run(TensorDict({"input": x}, [3]))
            again = run(TensorDict({"input": x}, [3]))["attr", "input"]
        torch.testing.assert_close(td["output"], model(x).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again, td["attr", "input"], rtol=1e-9, atol=1e-9)
        arrived = td["attr", "input"].flatten(1).sum(1)
        assert (arrived - wanted).abs().max() <= 1e-9 * max(1.0, wanted.abs().max())
        if ledger:
            assert td["ledger", "gap"].abs().max() <= 1e-9 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_so_it_does_in_single_precision(name: str) -> None:
    make, shape = CASES[name]
    model = make().eval().float()
    x, start = torch.randn(3, *shape).float(), torch.randn(3, *shape).float()
    wanted = (model(x) - model(start)).detach()[:, 1]
    with LRP("deeplift", target=Target("output", 1), baseline=start).prepare(model) as run:
        relevance = run(TensorDict({"input": x}, [3]))["attr", "input"].flatten(1)
    assert (relevance.sum(1) - wanted).abs().max() <= 1e-5 * max(1.0, float(relevance.abs().sum(1).max()))
