"""A model that was changed after it was wrapped is explained as it now is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()


class Adapter(nn.Module):
    """A low-rank adapter around a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, layer.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2)
    )
    return model.double()


def _list(model: nn.Sequential) -> None:
    model[2].add_module("more", nn.Linear(6, 6).double())


def _reordered(model: nn.Sequential) -> None:
    square = nn.Linear(4, 4).double()
    children = dict(model._modules)
    model._modules.clear()
    model._modules.update(first=square, **children)


def _widened(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(torch.randn(2, 6).double())


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a head is replaced": lambda model: model.__setitem__(3, nn.Linear(6, 2, bias=False).double()),
    "an activation is replaced": lambda model: model.__setitem__(1, nn.Tanh()),
    "an inner layer is replaced": lambda model: model[2].__setitem__(0, nn.Linear(8, 6).double()),
    "a layer is appended": lambda model: model.append(nn.Linear(2, 2).double()),
    "a layer is inserted": lambda model: model.insert(1, nn.Linear(8, 8).double()),
    "a layer is removed": lambda model: model.__delitem__(1),
    "a layer is registered within": _list,
    "layers stand in another order": _reordered,
    "an adapter": lambda model: model.__setitem__(3, Adapter(model[3])),
    "a parametrisation": lambda model: parametrizations.weight_norm(model[0]),
    "a parametrisation that is taken off": lambda model: (
        parametrizations.weight_norm(model[0]),
        parametrize.remove_parametrizations(model[0], "weight"),
    ),
    "pruned weights": lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
    "another weight": _widened,
    "no bias": lambda model: setattr(model[0], "bias", None),
    "a buffer": lambda model: model[0].register_buffer("seen", torch.zeros(1)),
}


def entries(td: TensorDict) -> dict[str, Tensor]:
    return {str(key): value for key, value in td.items(True, True) if isinstance(value, Tensor)}


def compare(explained, lrp, model: nn.Module) -> None:
    found = explained(TensorDict({"input": X}, [3]))
    wanted = lrp.wrap(model)(TensorDict({"input": X}, [3]))
    torch.testing.assert_close(entries(found), entries(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["epsilon_plus", "attn_lrp", "epsilon_plus_flat"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_explained_as_it_is(change: str, preset: str) -> None:
    lrp, model = LRP(preset, target=Target("output", 0), ledger=True), net()
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    CHANGES[change](model)
    compare(explained, lrp, model)
    compare(explained, lrp, model)


def test_within_a_block_too() -> None:
    lrp, model = LRP("epsilon_plus", target=Target("output", 0)), net()
    with lrp.prepare(model) as explained:
        explained(TensorDict({"input": X}, [3]))
        model[3] = nn.Linear(6, 2).double()
        compare(explained, lrp, model)


def test_layers_in_a_list() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = list(net())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    lrp, model = LRP("epsilon_plus", target=Target("output", 0)), Plain()
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    model.layers.append(nn.Linear(2, 2).double())
    model.layers[0] = nn.Linear(4, 8, bias=False).double()
    compare(explained, lrp, model)


class Swapped(nn.Module):
    """Layers that are given another forward, and a list of adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU()
        self.linear, self.softmax, self.adapters = nn.Linear(6, 5), nn.Softmax(1), []
        self.scale: object = None
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x[:, None]))).flatten(1)
        y = self.linear(h)
        for adapter in self.adapters:
            y = y + adapter(h)
        return y if self.scale is None else self.scale(y)


def _other_forward(self: nn.Linear, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, 2 * self.weight.abs(), self.bias)


class Squared(nn.Linear):
    """What a layer computes that was given that forward."""

    forward = _other_forward


def _through(layer: nn.Linear, y: Tensor) -> Tensor:
    return layer(y)


def _adapted() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 5).double()


PUT_ON: dict[str, tuple[Callable[[Swapped], object], Callable[[Swapped], object]]] = {
    "a forward of a layer": (
        lambda model: setattr(model.linear, "forward", _other_forward.__get__(model.linear)),
        lambda model: setattr(model.linear, "__class__", Squared),
    ),
    "a forward of an activation": (
        lambda model: setattr(model.act, "forward", torch.tanh),
        lambda model: setattr(model, "act", nn.Tanh()),
    ),
    "the first of a list": (
        lambda model: model.adapters.append(_adapted()),
        lambda model: setattr(model, "adapters", [_adapted()]),
    ),
    "a function of a layer": (
        lambda model: setattr(model, "scale", partial(_through, nn.Linear(5, 5).double())),
        lambda model: None,
    ),
}


@pytest.mark.parametrize("preset", ["epsilon", "epsilon_plus", "excitation_backprop", "attn_lrp"])
@pytest.mark.parametrize("change", PUT_ON)
def test_what_is_put_on_a_model_is_explained(change: str, preset: str) -> None:
    lrp, model, other = LRP(preset, target=Target("output", 0), ledger=True), Swapped(), Swapped()
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    put, same = PUT_ON[change]
    put(model)
    same(other)
    compare(explained, lrp, model)
    found = explained(TensorDict({"input": X}, [3]))
    assert found["ledger", "gap"].abs().max() < 1e-9 * (1 + found["ledger", "target"].abs().max())
    if change != "a function of a layer":
        wanted = lrp.wrap(other)(TensorDict({"input": X}, [3]))
        torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"], rtol=1e-9, atol=1e-12)


def test_paths_name_the_modules_that_are_there_now() -> None:
    lrp = GradientTimesInput(target=Target("output", 0), input_modules=["2"])
    model = net()
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    model[2] = nn.Sequential(nn.Linear(8, 6).double(), nn.Tanh())
    compare(explained, lrp, model)


def test_a_sequence_of_modules_with_keys() -> None:
    model = TensorDictSequential(
        TensorDictModule(net(), ["input"], ["hidden"]),
        TensorDictModule(nn.Linear(2, 2).double(), ["hidden"], ["output"]),
    )
    lrp = LRP("epsilon_plus", target=Target("output", 0))
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    model.module[1] = TensorDictModule(nn.Linear(2, 3, bias=False).double(), ["hidden"], ["output"])
    compare(explained, lrp, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_graphs_are_made_again() -> None:
    model = net()
    lrp = LRP("epsilon_plus", target=Target("output", 0), compile={"backend": "aot_eager"})
    explained = lrp.wrap(model)
    explained(TensorDict({"input": X}, [3]))
    model[3] = nn.Linear(6, 2, bias=False).double()
    found = explained(TensorDict({"input": X}, [3]))
    wanted = LRP("epsilon_plus", target=Target("output", 0)).wrap(model)(TensorDict({"input": X}, [3]))
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"], rtol=1e-9, atol=1e-12)
