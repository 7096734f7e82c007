"""Parallel models: what torch wraps around a model that several processes or devices run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tdhook.tape.internals import children_of
from tdhook.tape.sharded import is_sharded

__all__ = [
    "forward_put_on",
    "home_of",
    "is_elsewhere",
    "is_of_torch",
    "lends_weights",
    "running_alone",
    "unwrapped",
    "wrappers_among",
]

# Where a module keeps what its own `compile()` made of its calls.
_COMPILED = "_compiled_call_impl"
_ABSENT = object()


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel``, and what ``torch.compile`` makes of a model.

    The first two split batches or join gradients. An explanation needs neither, and a process may make one by itself.
    """
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inside := children_of(module).get("_orig_mod"), nn.Module):
            module = inside
        else:
            return module


def wrappers_among(modules: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Those wrappers among the modules of a model, and the modules that are compiled in place.

    Raises:
        NotImplementedError: one of them can have no backward pass that ends at inputs.
    """
    for module in modules:
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise NotImplementedError(
                "FullyShardedDataParallel gathers parameters for backward passes that end at parameters, and those of "
                "an explanation end at inputs: shard the model with torch.distributed.fsdp.fully_shard instead"
            )
    return tuple(m for m in modules if unwrapped(m) is not m or m.__dict__.get(_COMPILED) is not None)


@contextmanager
def running_alone(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """Have wrappers do what the models inside them do, as if there were one process and one device, and no compiler."""
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for wrapper in wrappers:
            attributes: dict[str, Any] = wrapper.__dict__
            instead = {_COMPILED: None} if unwrapped(wrapper) is wrapper else {"forward": unwrapped(wrapper)}
            changed.append((attributes, {name: attributes.get(name, _ABSENT) for name in instead}))
            attributes.update(instead)
        yield
    finally:
        for attributes, before in reversed(changed):
            for name, value in before.items():
                if value is _ABSENT:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value


def lends_weights(module: nn.Module) -> bool:
    """Whether parameters of a module are gathered while it runs, and given back afterwards (``fully_shard``)."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether weights of a model are not all in this process: divided among several, or brought for each call."""
    return any(is_sharded(x) or x.is_meta for x in (*module.parameters(), *module.buffers()))


def forward_put_on(module: nn.Module) -> Callable[..., object] | None:
    """The forward pass that somebody put on a module in the place of that of its class, if anybody did."""
    forward: Any = module.__dict__.get("forward")
    while hasattr(forward, "replaced"):  # a rule is on
        forward = forward.replaced[0]
    return cast("Callable[..., object] | None", forward)


def home_of(module: nn.Module) -> str:
    """Where the forward pass of a module is written: the name of a file of Python.

    What is mixed into its class besides, as ``fully_shard`` does, is of no account.
    """
    own = forward_put_on(module)
    if own is not None:
        return str(getattr(own, "__module__", ""))
    return next(cls.__module__ for cls in type(module).__mro__ if "forward" in cls.__dict__)


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is a layer of torch, and computes what its class does."""
    return forward_put_on(module) is None and home_of(module).startswith("torch.nn.modules.")
