"""Reading: how rows of a source are read and explained, one stretch after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

from tensordict.utils import NestedKey
from torch import nn

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.contexts.explained import ExplainedModule
from tdhook.datasets.explaining import Explaining, Prepare
from tdhook.datasets.rows import Rows
from tdhook.models.capture import module_path
from tdhook.models.model import InKeys, Model
from tdhook.models.parallel import unwrapped

__all__ = ["Reading", "asked_of", "explaining", "is_path", "path_of", "root_of", "written_at"]


class Reading(TypedDict, total=False):
    """How rows are read: keywords of :class:`~tdhook.datasets.Job`, where they are described."""

    in_keys: InKeys | None
    out_keys: Sequence[NestedKey] | None
    at: NestedKey | None
    prepare: Prepare | None
    trajectories: bool
    in_order: bool
    mask_key: NestedKey | None
    at_once: int | None
    seed: int


def explaining(method: Attribution, policy: nn.Module, rows: Rows, reading: Reading) -> Explaining:
    """What explains rows by a method, having settled how many at once."""
    found = Explaining(
        method,
        root_of(policy),
        rows,
        reading.get("prepare"),
        reading.get("in_keys"),
        reading.get("out_keys"),
        reading.get("at"),
        reading.get("trajectories", False),
        reading.get("in_order", False),
        reading.get("mask_key", ("collector", "mask")),
        reading.get("at_once"),
        reading.get("seed", 0),
    )
    found.settle()
    return found


def root_of(policy: nn.Module) -> nn.Module:
    """The model itself, if it is explained or distributed already."""
    return policy.model.root if isinstance(policy, ExplainedModule) else unwrapped(policy)


def is_path(policy: nn.Module, layer: NestedKey) -> bool:
    """Whether a layer is the path of a module of the policy, ``"path:1"`` of its second call, and not a key.

    ``"path:input"`` is what the module is given.
    """
    if not isinstance(layer, str):
        return False
    try:
        Model.of(root_of(policy)).submodule(module_path(path_of(layer)))
    except ValueError:
        return False
    return True


def path_of(layer: str) -> str:
    """The path of a module without the call that is meant."""
    return re.sub(r":\d+$", "", layer)


def written_at(layer: NestedKey) -> NestedKey:
    """The name under which methods write what belongs to a layer: that of a first call is the path."""
    return layer.removesuffix(":0") if isinstance(layer, str) else layer


def asked_of(policy: nn.Module, layer: NestedKey) -> Shared:
    """The options of a method that gives relevance of a layer, and of nothing else."""
    if is_path(policy, layer):
        return {"attribute": None, "input_modules": [path_of(str(layer))], "use_inputs": False}
    return {"attribute": [layer], "input_modules": None, "use_inputs": False}
