"""Only what depends on the inputs is explained: all else is a constant, however a model reaches it."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput, IntegratedGradients
from tdhook.rules import EpsilonRule

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
PRESETS = ("epsilon", "epsilon_plus", "epsilon_alpha2_beta1_flat", "attn_lrp")


def seeded(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def read_as(function: Callable[[Tensor], Tensor]) -> TensorDictModule:
    return TensorDictModule(function, ["input"], ["output"])


class Holder:
    """No module, but something that has one."""

    def __init__(self, inside: object) -> None:
        self.inside = inside

    def __call__(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def run(self, x: Tensor) -> Tensor:
        return self.inside(x)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: nn.Module) -> None:
        self.inside = inside

    def __call__(self, x: Tensor) -> Tensor:
        return self.inside(x)


@dataclass
class Config:
    inside: nn.Module


class Plain(nn.Module):
    """Layers in an attribute that does not register them."""

    def __init__(self, layers: object) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers.values() if isinstance(self.layers, dict) else self.layers
        for layer in layers:
            x = layer(x)
        return x


class Calls(nn.Module):
    """Calls what is at the end of a way through its attributes."""

    def __init__(self, held: object, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(held=held, call=call)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


GLOBAL = net()
LAYERS = list(net())
NAMED = {"inside": net()}
HELD = Holder(net())


def _defaults(x: Tensor, layers: nn.Module = GLOBAL) -> Tensor:
    return layers(x)


def _global(x: Tensor) -> Tensor:
    return GLOBAL(x)


def _global_list(x: Tensor) -> Tensor:
    return reduce(lambda value, layer: layer(value), LAYERS, x)


class OfTheClass(nn.Module):
    layers: ClassVar[list[nn.Module]] = list(net())

    def forward(self, x: Tensor) -> Tensor:
        return self.through(x)

    def through(self, x: Tensor) -> Tensor:
        return reduce(lambda value, layer: layer(value), self.layers, x)


class NamesAGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    @staticmethod
    def helper(x: Tensor) -> Tensor:
        return _global(x)


def _local_class() -> nn.Module:
    inner = net()

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x)

    return Local()


def _given_a_forward() -> nn.Module:
    inner, module = net(), Plain(())
    module.forward = lambda x: inner(x)
    return module


def _in_a_closure() -> Callable[[Tensor], Tensor]:
    inner = net()

    def outer(x: Tensor) -> Tensor:
        return inside(x)

    def inside(x: Tensor) -> Tensor:
        return inner(x)

    return outer


HOLDERS: dict[str, Callable[[], nn.Module]] = {
    "lambda": lambda: (lambda inner: read_as(lambda x: inner(x)))(net()),
    "closure in a closure": lambda: read_as(_in_a_closure()),
    "global": lambda: read_as(lambda x: GLOBAL(x)),
    "default": lambda: read_as(_defaults),
    "partial": lambda: read_as(partial(lambda layers, x: layers(x), net())),
    "bound method": lambda: read_as(net().forward),
    "bound method of an object": lambda: read_as(Holder(net()).run),
    "object that is called": lambda: read_as(Holder(net())),
    "object with slots": lambda: read_as(Slotted(net())),
    "object in an object": lambda: Calls(Holder(Holder(net())), lambda held, x: held.inside.inside(x)),
    "objects in a list": lambda: Plain([Holder(layer) for layer in net()]),
    "dataclass": lambda: Calls(Config(net()), lambda held, x: held.inside(x)),
    "namespace": lambda: Calls(SimpleNamespace(inside=net()), lambda held, x: held.inside(x)),
    "weak reference": lambda: Calls(weakref.ref(GLOBAL), lambda held, x: held()(x)),
    "deque": lambda: Plain(deque(net())),
    "global function": lambda: read_as(_global),
    "function that calls another": lambda: read_as(lambda x: _global(x)),
    "global list": lambda: read_as(_global_list),
    "global dictionary": lambda: read_as(lambda x: NAMED["inside"](x)),
    "global object": lambda: read_as(lambda x: HELD.inside(x)),
    "function with a cache": lambda: read_as(lru_cache(_global)),
    "partial method": lambda: read_as(partial(Holder.run, Holder(net()))),
    "attribute of a class": OfTheClass,
    "global in a method": NamesAGlobal,
    "method of a module": lambda: read_as(NamesAGlobal().helper),
    "class in a function": _local_class,
    "forward that was put on": _given_a_forward,
    "list": lambda: Plain(list(net())),
    "tuple": lambda: Plain(tuple(net())),
    "dict": lambda: Plain({str(i): layer for i, layer in enumerate(net())}),
    "list of lambdas": lambda: Plain([(lambda inner: lambda x: inner(x))(layer) for layer in net()]),
}


def explained(model: nn.Module, method: str | LRP, flow: str | None = None) -> TensorDict:
    lrp = (
        LRP(method, target=Target("output", 0), ledger=True, flow=flow) if isinstance(method, str) else method
    )
    with lrp.prepare(model) as module:
        return module(TensorDict({"input": X}, [len(X)]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_layers_have_their_rules_wherever_they_are_held(holder: str, preset: str) -> None:
    wanted, found = explained(net(), preset), explained(HOLDERS[holder](), preset)
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"], rtol=1e-12, atol=1e-14)
    assert found["ledger", "gap"].abs().max() < 1e-9


class Prototypes(nn.Module):
    """Similarity to prototypes at a temperature, and an offset."""

    def __init__(self, hold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.points, self.sharpness, self.offset = hold(seeded(3, 5)), hold(seeded(1).abs()), hold(seeded(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.points.T * self.sharpness).softmax(-1) @ self.points + self.offset


class Held:
    def __init__(self, value: Tensor) -> None:
        self.value = value


HOLDS: dict[str, Callable[[Tensor], object]] = {
    "a leaf": lambda x: x.clone().requires_grad_(),
    "computed once and kept": lambda x: x.clone().requires_grad_() * 1.0,
    "a view of another": lambda x: torch.cat([x, x]).requires_grad_()[: len(x)],
    "no gradient": lambda x: x,
}


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("preset", ["epsilon", "attn_lrp"])
@pytest.mark.parametrize("hold", HOLDS)
def test_tensors_that_are_not_registered_are_as_parameters(hold: str, preset: str, flow: str) -> None:
    wanted = explained(Prototypes(nn.Parameter), preset, flow)
    found = explained(Prototypes(HOLDS[hold]), preset, flow)
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        found["ledger"].contiguous(), wanted["ledger"].contiguous(), rtol=1e-9, atol=1e-9
    )


def test_what_is_computed_of_constants_alone_is_a_constant() -> None:
    class Hyper(nn.Module):
        def __init__(self, task: Tensor) -> None:
            super().__init__()
            self.task, self.make = task, nn.Linear(3, 10).double()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.make(self.task).unflatten(-1, (5, 2))

    torch.manual_seed(0)
    model = Hyper(seeded(3).requires_grad_())
    weight = model.make(model.task).unflatten(-1, (5, 2)).detach()
    found = explained(model, "epsilon")["attr", "input"]
    torch.testing.assert_close(found, X * weight[:, 0], rtol=1e-6, atol=1e-9)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.state = nn.GRUCell(5, 4), nn.Linear(4, 2), None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, self.state)
        return self.head(self.state)


@pytest.mark.parametrize("preset", ["lstm_lrp", "epsilon"])
def test_state_from_the_call_before_is_a_constant(preset: str) -> None:
    first, second = Keeps().double(), Keeps().double()
    explained(first, preset)
    second.state = first.state.detach().clone()
    once, again = explained(first, preset), explained(second, preset)
    torch.testing.assert_close(once["attr", "input"], again["attr", "input"], rtol=1e-12, atol=1e-14)
    assert once["ledger", "gap"].abs().max() < 1e-9


def test_nothing_is_frozen_meanwhile() -> None:
    """Another thread that trains the model meanwhile gets its gradients."""
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(p.requires_grad for p in model.parameters())
            return x

    model = nn.Sequential(*net(), Looks())
    explained(model, "epsilon_plus")
    assert seen and all(seen)


def test_a_graph_of_a_constant_that_is_kept_stays_the_users() -> None:
    weight = seeded(5, 2).requires_grad_()
    kept = weight * 2
    explained(read_as(lambda x: x @ kept), "epsilon")
    kept.sum().backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 2.0))


@pytest.mark.parametrize("preset", ["epsilon", "attn_lrp"])
def test_a_buffer_that_is_overwritten_holds_what_was_written(preset: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = seeded(4, 3).requires_grad_() * 1.0
            self.layer, self.head = nn.Linear(5, 3).double(), nn.Linear(3, 2, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            self.memory.copy_(self.layer(x))
            return self.head(self.memory)

    torch.manual_seed(0)
    model = Writes()
    found = explained(model, preset)
    plain = nn.Sequential(model.layer, model.head)
    torch.testing.assert_close(model.memory.detach(), model.layer(X).detach())
    torch.testing.assert_close(
        found["attr", "input"], explained(plain, preset)["attr", "input"], rtol=1e-9, atol=1e-12
    )


class Inner(nn.Module):
    """The force of an energy, found by differentiating in the forward pass."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.head, self.detached = nn.Linear(5, 2, bias=False).double(), detached

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_() if self.detached else x.requires_grad_() if x.is_leaf else x
            (force,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=not self.detached)
        return self.head(x * force)


@pytest.mark.parametrize("preset", ["epsilon_plus", "attn_lrp"])
def test_a_model_that_differentiates_constants_computes_what_it_does(preset: str) -> None:
    model = Inner(detached=True)
    found = explained(model, preset)
    torch.testing.assert_close(found["output"], model(X).detach(), rtol=0, atol=0)
    force = torch.autograd.grad(model.energy(y := X.clone().requires_grad_()).sum(), y)[0]
    wanted = explained(read_as(lambda x: model.head(x * force)), preset)["attr", "input"]
    torch.testing.assert_close(found["attr", "input"], wanted, rtol=1e-9, atol=1e-12)


def test_rules_do_not_stand_in_for_derivatives_that_a_model_takes() -> None:
    model = Inner(detached=False)
    with pytest.raises(
        NotImplementedError, match="differentiates in its forward pass, in module `\\(model\\)`"
    ):
        explained(model, "epsilon_plus")
    found = explained(model, LRP([(Inner, EpsilonRule())], target=Target("output", 0), ledger=True))
    torch.testing.assert_close(found["output"], model(X.clone()).detach())
    assert found["ledger", "gap"].abs().max() < 1e-9


class Transforms(nn.Module):
    """Gates its input by what a transform makes of an energy."""

    def __init__(self, made: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.head, self.made = nn.Linear(5, 2, bias=False).double(), made

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.made(lambda y: self.energy(y).sum(), x))


# The first derivative in forward mode loads functions that torch itself deprecates.
of_torch = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda energy, x: torch.func.grad(energy)(x),
    "grad of each": lambda energy, x: torch.vmap(torch.func.grad(energy))(x),
    "vjp": lambda energy, x: torch.func.vjp(energy, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp": lambda energy, x: torch.func.jvp(energy, (x,), (torch.ones_like(x),))[1],
    "jacobian": lambda energy, x: torch.vmap(torch.func.jacrev(energy))(x),
    "functionalize": lambda energy, x: torch.func.functionalize(energy)(x),
}


@of_torch
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_nor_for_those_by_torch_func(name: str, flow: str) -> None:
    model = Transforms(TRANSFORMS[name])
    with pytest.raises(NotImplementedError, match=r"differentiates in its forward pass by torch\.func"):
        explained(model, "epsilon", flow)
    if name == "functionalize":
        return
    for against in ({}, {"baseline": 0.1}):
        unit = LRP(
            [(Transforms, EpsilonRule())], target=Target("output", 0), flow=flow, ledger=True, **against
        )
        found = explained(model, unit)
        torch.testing.assert_close(found["output"], model(X.clone()).detach())
        assert found["ledger", "gap"].abs().max() < 1e-9


@of_torch
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_constants_by_torch_func(name: str) -> None:
    """They are numbers."""
    model = Transforms(lambda energy, x: TRANSFORMS[name](energy, x.detach()))
    factor = TRANSFORMS[name](lambda y: model.energy(y).sum(), X).detach()
    wanted = explained(read_as(lambda x: model.head(x * factor)), "epsilon_plus")["attr", "input"]
    found = explained(model, "epsilon_plus")["attr", "input"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch computed of a leaf makes no graph, which is said
@pytest.mark.parametrize("hold", ["a leaf", "computed once and kept"])
def test_constants_are_constants_in_a_graph(hold: str) -> None:
    model = Prototypes(HOLDS[hold])
    td = TensorDict({"input": X}, [len(X)])
    eager = LRP("attn_lrp", target=Target("output", 0)).wrap(model)(td.clone())
    graph = LRP("attn_lrp", target=Target("output", 0), compile={"backend": "aot_eager"})
    graph = graph.wrap(model)(td.clone())
    torch.testing.assert_close(graph["attr", "input"], eager["attr", "input"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [GradientTimesInput, IntegratedGradients])
def test_gradients_go_where_they_did(method: type) -> None:
    found = explained(Prototypes(HOLDS["a leaf"]), method(target=Target("output", 0)))
    wanted = explained(Prototypes(nn.Parameter), method(target=Target("output", 0)))
    torch.testing.assert_close(found["attr", "input"], wanted["attr", "input"])


@pytest.mark.parametrize("ledger", [False, True])
def test_the_tape_is_gone_when_a_call_is_over(ledger: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.tanh()
            alive.append(weakref.ref(z))
            return z

    model = nn.Sequential(nn.Linear(5, 3), Watched(), nn.Linear(3, 2)).double()
    composite = [(Watched, EpsilonRule(1e-6, zero_params="bias")), (nn.Linear, EpsilonRule())]
    for method in (composite, "epsilon_plus", "attn_lrp"):
        explained = LRP(method, target=Target("output", 0), ledger=ledger).wrap(model)
        explained(TensorDict({"input": X}, [len(X)]))
    gc.collect()
    assert len(alive) >= 3 and all(reference() is None for reference in alive)
