"""Modules that remember, each in a way of its own: a value for each call."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Queue
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tensordict import TensorDict, lazy_stack
from torch import Tensor, nn

__all__ = ["KINDS", "Net"]


@dataclass
class Memory:
    count: int = 0
    past: list[int] = field(default_factory=list)


class Slots:
    __slots__ = ("count", "late")

    def __init__(self) -> None:
        self.count = 0


class Node:
    """One of a chain that closes on itself."""

    def __init__(self) -> None:
        self.next, self.value = self, 0.0


class Net(nn.Module):
    """Adds to its input what it remembers.

    Args:
        remember: told the module and its input in each call; what it returns is added.
        overwrites: the call, counted from zero, from which on a tensor is overwritten; ``None`` for never.
    """

    def __init__(
        self, start: Callable[[Net], None], remember: Callable[[Net, Tensor], object], overwrites: int | None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.remember, self.overwrites = remember, overwrites
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh() + self.remember(self, x.detach())
        if self.overwrites is not None and len(x) > self.overwrites:
            y = torch.zeros_like(h)
            y += h
            y[:, 0] *= 2
            h = y
        return self.head(h)


KINDS: dict[str, tuple[Callable[[Net], None], Callable[[Net, Tensor], object]]] = {}
Remember = Callable[[Net, Tensor], object]


def kind(name: str, start: Callable[[Net], None] = lambda net: None) -> Callable[[Remember], Remember]:
    def register(remember: Remember) -> Remember:
        KINDS[name] = start, remember
        return remember

    return register


@kind("nothing")
def nothing(net: Net, x: Tensor) -> object:
    return 0.0


@kind("a number", lambda net: setattr(net, "count", 0))
def number(net: Net, x: Tensor) -> object:
    net.count += 1
    return net.count


@kind("an attribute that is new")
def new(net: Net, x: Tensor) -> object:
    if hasattr(net, "late"):
        del net.late
        return 1.0
    net.late = 1
    return 0.0


@kind("a list", lambda net: setattr(net, "past", []))
def history(net: Net, x: Tensor) -> object:
    net.past.append(x.mean())
    return torch.stack(net.past).sum()


@kind("a queue", lambda net: setattr(net, "left", []))
def queue(net: Net, x: Tensor) -> object:
    if not net.left:
        net.left = [1.0, 2.0, 3.0]
    return net.left.pop()


@kind("a deque of limited length", lambda net: setattr(net, "past", deque([0.0], maxlen=2)))
def last(net: Net, x: Tensor) -> object:
    net.past.append(net.past[-1] + 1)
    return sum(net.past)


@kind("a set", lambda net: setattr(net, "seen", set()))
def seen(net: Net, x: Tensor) -> object:
    net.seen.add(len(net.seen))
    return len(net.seen)


@kind("a cache", lambda net: setattr(net, "cache", {}))
def cache(net: Net, x: Tensor) -> object:
    return net.cache.setdefault("first", x.mean()) + len(net.cache)


@kind("a cache that forgets the oldest", lambda net: setattr(net, "cache", OrderedDict(a=1.0, b=2.0, c=3.0)))
def oldest(net: Net, x: Tensor) -> object:
    net.cache.move_to_end(next(iter(net.cache)))
    return next(iter(net.cache.values()))


@kind("a counter", lambda net: setattr(net, "counter", Counter()))
def counter(net: Net, x: Tensor) -> object:
    net.counter.update(["call"])
    return net.counter["call"]


@kind("containers in each other", lambda net: setattr(net, "deep", {"a": ([0.0], {"b": [1.0]})}))
def deep(net: Net, x: Tensor) -> object:
    net.deep["a"][1]["b"].append(2.0)
    net.deep["a"][0][0] += 1
    return sum(net.deep["a"][1]["b"]) + net.deep["a"][0][0]


@kind("an object", lambda net: setattr(net, "memory", Memory()))
def memory(net: Net, x: Tensor) -> object:
    net.memory.count += 1
    net.memory.past.append(net.memory.count)
    return sum(net.memory.past)


@kind("an object of slots", lambda net: setattr(net, "memory", Slots()))
def slots(net: Net, x: Tensor) -> object:
    net.memory.count += 1
    net.memory.late = getattr(net.memory, "late", 0) + 1
    return net.memory.count * net.memory.late


@kind("objects that lead in a circle", lambda net: setattr(net, "node", Node()))
def circle(net: Net, x: Tensor) -> object:
    other = Node()
    other.next, other.value = net.node.next, net.node.value + 1
    net.node.next, net.node = other, other
    return other.value + other.next.value


@kind("a buffer that is replaced", lambda net: net.register_buffer("h", torch.zeros(())))
def replaced(net: Net, x: Tensor) -> object:
    net.h = net.h + 1
    return net.h


@kind("a buffer that is overwritten", lambda net: net.register_buffer("h", torch.zeros(())))
def overwritten(net: Net, x: Tensor) -> object:
    net.h += 1
    return net.h.clone()


@kind("a buffer that was none", lambda net: net.register_buffer("h", None))
def was_none(net: Net, x: Tensor) -> object:
    net.h = torch.zeros(()) if net.h is None else net.h + 1
    return net.h


@kind("a buffer that is registered")
def registered(net: Net, x: Tensor) -> object:
    if "h" not in net._buffers:
        net.register_buffer("h", torch.zeros(()), persistent=False)
        return 0.0
    net.h.add_(1)
    return net.h.clone()


@kind("a tensor that is overwritten", lambda net: setattr(net, "h", torch.zeros(4)))
def hidden(net: Net, x: Tensor) -> object:
    net.h.mul_(0.5).add_(x[0])
    return net.h.clone()


@kind("a tensor that is given other memory", lambda net: setattr(net, "h", torch.zeros(4)))
def given(net: Net, x: Tensor) -> object:
    net.h.data = net.h.data + 1
    return net.h.clone()


@kind("a tensor that grows", lambda net: setattr(net, "h", torch.zeros(1)))
def grows(net: Net, x: Tensor) -> object:
    net.h.resize_(len(net.h) + 1).fill_(1.0)
    return net.h.sum()


@kind(
    "a tensor that is written to behind torch's back",
    lambda net: setattr(net, "h", torch.full((2,), torch.nan)),
)
def behind(net: Net, x: Tensor) -> object:
    net.h.numpy()[0] = np.nan_to_num(net.h.numpy()[0]) + 1.0
    return net.h[0].clone()


@kind("an array", lambda net: setattr(net, "h", np.zeros(3)))
def array(net: Net, x: Tensor) -> object:
    net.h += 1
    return float(net.h.sum())


@kind(
    "a TensorDict",
    lambda net: setattr(net, "td", TensorDict(a=torch.zeros(1), b=TensorDict(c=torch.zeros(1)))),
)
def tensordict(net: Net, x: Tensor) -> object:
    net.td["a"] = net.td["a"] + 1
    net.td["b", "c"].add_(2)
    net.td["b", f"d{len(net.td['b'].keys())}"] = torch.ones(1)
    return net.td["a"].sum() + net.td["b", "c"].sum().clone() + len(net.td["b"].keys())


@kind("a lazy stack", lambda net: setattr(net, "past", lazy_stack([TensorDict(a=torch.zeros(1))])))
def stack(net: Net, x: Tensor) -> object:
    net.past.append(TensorDict(a=torch.ones(1)))
    net.past.tensordicts[0]["a"] += 1
    return net.past["a"].sum() + net.past.batch_size[0]


@kind("layers that are made when they are needed", lambda net: setattr(net, "extra", None))
def made(net: Net, x: Tensor) -> object:
    if net.extra is None:
        net.extra = nn.Linear(4, 1)
    with torch.no_grad():
        return net.extra(x)


@kind("a module in a list", lambda net: setattr(net, "others", [nn.BatchNorm1d(4)]))
def in_a_list(net: Net, x: Tensor) -> object:
    with torch.no_grad():
        net.others[0](x)
    return net.others[0].running_mean.clone()


def holding(net: Net) -> None:
    net.space, net.waiting, net.bytes = SimpleNamespace(count=0), Queue(), bytearray(2)
    net.waiting.put(0)
    net.weak = WeakKeyDictionary({net.head: 0})


@kind("objects of Python that hold values", holding)
def of_python(net: Net, x: Tensor) -> object:
    net.space.count += 1
    net.waiting.put(net.waiting.get() + 1)
    net.bytes[0] += 1
    net.weak[net.head] += 1
    return net.space.count + net.waiting.queue[0] + net.bytes[0] + net.weak[net.head]


def generator_of(net: Net) -> None:
    net.generator = torch.Generator().manual_seed(1)


class Annotated(list[int]):
    """A list that has attributes."""


@kind("an attribute of a list", lambda net: setattr(net, "past", Annotated([1])))
def annotated(net: Net, x: Tensor) -> object:
    net.past.late = getattr(net.past, "late", 0) + 1
    return net.past.late


@kind("an array of objects", lambda net: setattr(net, "past", np.array([[1], None], dtype=object)))
def objects(net: Net, x: Tensor) -> object:
    net.past[0].append(1)
    net.past[1] = len(net.past[0])
    return net.past[1]


def closing(net: Net) -> None:
    count, past = 0, []

    def step(added: list[int]) -> int:
        nonlocal count
        count += 1
        past.append(count)
        added.append(count)
        step.calls = getattr(step, "calls", 0) + 1
        return sum(past) + len(added) + step.calls

    net.step = partial(step, [])


@kind("what a function closes over, was given and has as an attribute", closing)
def closed_over(net: Net, x: Tensor) -> object:
    return net.step()


def _remember(seen: list[int], module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    seen.append(1)
    return args[0] * len(seen)


def hooked(net: Net) -> None:
    calls: list[int] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output + len(calls)

    net.linear.register_forward_hook(hook)
    net.linear.register_forward_pre_hook(partial(_remember, [0]))


@kind("what a hook closes over and was given", hooked)
def of_a_hook(net: Net, x: Tensor) -> object:
    return 0.0


@kind("a tensor that requires a gradient", lambda net: setattr(net, "h", torch.zeros(4, requires_grad=True)))
def requiring(net: Net, x: Tensor) -> object:
    with torch.no_grad():
        net.h.add_(1)
    return net.h.detach().clone()


@kind("an object whose method is called", lambda net: setattr(net, "step", Annotated([1]).append))
def bound(net: Net, x: Tensor) -> object:
    net.step(1)
    return len(net.step.__self__)


@kind("a generator of torch", generator_of)
def torch_generator(net: Net, x: Tensor) -> object:
    return torch.rand(1, generator=net.generator)


@kind("a generator of Python", lambda net: setattr(net, "random", random.Random(1)))
def python_generator(net: Net, x: Tensor) -> object:
    return net.random.random()


@kind("a generator of numpy", lambda net: setattr(net, "random", np.random.default_rng(1)))
def numpy_generator(net: Net, x: Tensor) -> object:
    return float(net.random.random())


@kind("an older generator of numpy", lambda net: setattr(net, "random", np.random.RandomState(1)))
def older_generator(net: Net, x: Tensor) -> object:
    return float(net.random.rand())


@kind("no generator of its own")
def shared(net: Net, x: Tensor) -> object:
    return torch.rand(1) + random.random() + float(np.random.rand())
