"""Small models of the transformers library: of each registered type the base model, with random weights."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.supported.shim import import_torchvision
from benchmarks.supported.shrinking import Way, parts, shrunk

import_torchvision()  # which some files of transformers import
import transformers  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

__all__ = ["NotBuilt", "classes", "model_types", "random_weights", "settle", "small"]


class NotBuilt(Exception):
    """Why there is no small model of a type."""


def model_types() -> list[str]:
    """All types that the library registers, sorted."""
    return sorted(CONFIG_MAPPING._mapping)


def classes(model_type: str) -> list[type[nn.Module]]:
    """The classes whose configuration is the type's: the base model, or else others, as they are registered."""
    config = CONFIG_MAPPING[model_type]
    tables = {k: v for k, v in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", k)}
    named = [
        name
        for table in sorted(tables, key=lambda table: (table != "MODEL_MAPPING_NAMES", table))
        for name in _each(tables[table].get(model_type, ()))
    ]
    package = config.__module__.rpartition(".configuration")[0]
    modules = [m for m in _modeling(config.__module__) if m is not None]
    homes = [*modules, transformers]
    found = [getattr(m, name) for name in dict.fromkeys(named) for m in homes if hasattr(m, name)]
    if not found:  # registered without a model: what reads this configuration beside it
        found = [
            cls
            for m in modules
            for cls in vars(m).values()
            if inspect.isclass(cls)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__.startswith(package)
            and getattr(cls, "config_class", None) is config
            and not cls.__name__.endswith("PreTrainedModel")
        ]
    found = list(dict.fromkeys(cls for cls in found if cls.forward is not nn.Module.forward))
    if not found:
        raise NotBuilt("the library has no model of it by itself with a forward pass")
    return found


def _each(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _modeling(configuration: str) -> Iterator[Any]:
    name = configuration.replace(".configuration_", ".modeling_")
    try:
        yield importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise NotBuilt(f"needs the package {error.name}") from error


def small(model_type: str, cls: type[nn.Module], way: Way, largest: int) -> nn.Module:
    """The model in double precision with random weights.

    Raises:
        NotBuilt: it would be too large.
    """
    config = shrunk(CONFIG_MAPPING[model_type], way)
    for part in parts(config):  # grouped products of experts are in single precision only
        part._experts_implementation = "eager"
        if hasattr(part, "use_cache"):
            part.use_cache = False
    count = sum(p.numel() for p in _on_meta(cls, config).parameters())
    if count > largest:
        raise NotBuilt(f"has {count / 1e6:.0f} million weights where it is small")
    model = cls(config).to(torch.get_default_dtype()).eval()
    random_weights(model)
    return model


def _on_meta(cls: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        try:
            return cls(config)
        except (NotImplementedError, RuntimeError):  # it looks at values
            return nn.Module()


def random_weights(model: nn.Module) -> None:
    """Move each weight from where it begins, to a number that single precision has too."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1e3, 1e3)
                inputs = tensor[0].numel() if tensor.dim() > 1 else 1
                tensor.add_(torch.randn_like(tensor), alpha=min(0.1, inputs**-0.5))
            tensor.copy_(tensor.float())


def settle(model: nn.Module, run: Callable[[], object]) -> None:
    """Run a model once for its batch norms to take the statistics of what they see, if there is enough to see."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum) for norm in norms]
    handles = [norm.register_forward_pre_hook(_learn) for norm in norms]
    try:
        if norms:
            run()
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in kept:
            norm.eval().momentum = momentum
            for buffer in norm.buffers():
                buffer.copy_(buffer.float() if buffer.is_floating_point() else buffer)


def _learn(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    norm.momentum = 1.0
    norm.train(args[0].numel() // args[0].shape[1] > 1)
