"""Values from inside a model whose relevance is asked for: outputs of modules, and keys that are written on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.models.turns import here

__all__ = ["Captured", "captured"]

Captured: TypeAlias = "tuple[dict[str, Tensor], dict[NestedKey, Tensor]]"


@contextmanager
def captured(
    paths: Mapping[str, nn.Module], runner: nn.Module, attribute: tuple[NestedKey, ...] | str | None
) -> Iterator[Captured]:
    """Collect outputs of modules by path, and keys that TensorDictModules inside ``runner`` write.

    Args:
        paths: the modules.
        runner: the model.
        attribute: which keys; ``"all"`` of them, or ``None``.
    """
    modules: dict[str, Tensor] = {}
    keys: dict[NestedKey, Tensor] = {}
    handles = [m.register_forward_hook(here(_capture_output(path, modules))) for path, m in paths.items()]
    if attribute is not None:
        for module in runner.modules():
            if isinstance(module, TensorDictModuleBase):
                handles.append(module.register_forward_hook(here(_capture_keys(attribute, keys))))
    try:
        yield modules, keys
    finally:
        for handle in handles:
            handle.remove()


def _capture_output(path: str, found: dict[str, Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module {path!r} ({type(module).__name__}) returned {type(output).__name__}; only modules that return "
                "one tensor can be attributed or explained by path"
            )
        if not output.requires_grad and output.is_floating_point():
            output = output.detach().requires_grad_()
        found[path] = output
        return output

    return hook


def _capture_keys(
    attribute: tuple[NestedKey, ...] | str, found: dict[NestedKey, Tensor]
) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, TensorDictBase):
            return
        for key in map(unravel_key, module.out_keys):
            value = output.get(key, None)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if attribute == "all" or key in attribute:
                found[key] = value if value.requires_grad else value.detach().requires_grad_()
                if found[key] is not value:  # made of integers by a frozen module: here the graph begins
                    output.set(key, found[key])

    return hook
