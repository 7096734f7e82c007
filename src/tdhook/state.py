"""What a model holds besides its parameters: all of its modules, and the state that a run changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import nn

__all__ = ["dense_copy", "frozen", "modules_of", "restored"]


def modules_of(root: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by dotted path, those included that it holds without registering them.

    torchrl's multi-agent networks run such a module, with parameters that are kept elsewhere.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(prefix: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[prefix] = module
        hidden = [(name, m) for name, m in vars(module).items() if isinstance(m, nn.Module)]
        for name, child in [*module._modules.items(), *hidden]:
            if child is not None:
                visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", root)
    return found


@contextmanager
def restored(root: nn.Module, *, always: bool = True) -> Iterator[None]:
    """Put back the buffers of a model and the random state afterwards, always or only where the block raised."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in modules_of(root).values()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    on_cuda = torch.cuda.is_initialized()
    random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []
    put_back = True
    try:
        yield
        put_back = always
    finally:
        if put_back:
            torch.set_rng_state(random[0])
            if on_cuda:
                torch.cuda.set_rng_state_all(random[1])
            with torch.no_grad():
                for registry, name, buffer, value in buffers:
                    registry[name] = buffer.copy_(value)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take the parameters off the tape, so that only what depends on the inputs is on it."""
    thawed: list[torch.Tensor] = []
    for module in modules:
        own = module.parameters() if isinstance(module, TensorDictParams) else module._parameters.values()
        thawed += [p for p in own if p is not None and p.requires_grad and p.is_leaf]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def dense_copy(td: TensorDictBase) -> TensorDictBase:
    """A copy with the same tensors; a lazy stack is stacked once, so that reading an entry twice gives one tensor."""
    return td.contiguous() if isinstance(td, LazyStackedTensorDict) else td.copy()
