"""Parallel models: what torch wraps around a model that several processes or devices run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tdhook.tape.internals import children_of

__all__ = ["home_of", "lends_weights", "running_alone", "unwrapped", "wrappers_among"]


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
    """Those wrappers among the modules of a model.

    Raises:
        NotImplementedError: one of them can have no backward pass that ends at inputs.
    """
    for module in modules:
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise NotImplementedError(
                "FullyShardedDataParallel gathers parameters for backward passes that end at parameters, and those of "
                "an explanation end at inputs: shard the model with torch.distributed.fsdp.fully_shard instead"
            )
    return tuple(m for m in modules if isinstance(m, DataParallel | DistributedDataParallel))


@contextmanager
def running_alone(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """Have wrappers do what the models inside them do, as if there were one process and one device."""
    changed: list[nn.Module] = []
    try:
        for wrapper in wrappers:
            attributes: dict[str, Any] = wrapper.__dict__
            if "forward" not in attributes:
                attributes["forward"] = wrapper.module
                changed.append(wrapper)
        yield
    finally:
        for wrapper in changed:
            wrapper.__dict__.pop("forward", None)


def lends_weights(module: nn.Module) -> bool:
    """Whether parameters of a module are gathered while it runs, and given back afterwards (``fully_shard``)."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def home_of(module: nn.Module) -> str:
    """Where the forward pass of a module is written: the name of a file of Python.

    What is mixed into its class besides, as ``fully_shard`` does, is of no account.
    """
    return next(cls.__module__ for cls in type(module).__mro__ if "forward" in cls.__dict__)
