"""Reads: what a model needs of the TensorDict that it is given, where it says more than that.

A sequence asks for all of an entry, ``"params"``, of which its first module writes parts that the second one reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, WrapModule
from tensordict.utils import NestedKey, unravel_key
from torch import nn

from tdhook.keys import is_below

__all__ = ["keys_that_nobody_tells", "readable_by", "tells_what_it_reads", "written_before"]

_KNOWN = (
    "tensordict.",
    "torchrl.modules.tensordict_module.",
    "torchrl.modules.models.",
    "torchrl.envs.",
    "tdhook.",
)
"""Packages whose modules name what they read."""


def keys_that_nobody_tells(model: nn.Module) -> str:
    """What to say beside a key that is missing: of a function in a sequence, which does not say what it writes."""
    for path, module in model.named_modules():
        if isinstance(module, WrapModule) and not module.out_keys:
            return (
                f"; the function at {path or 'the root'!r} of the model does not say what it reads and writes: make it "
                "WrapModule(function, in_keys=[...], out_keys=[...])"
            )
    return ""


def tells_what_it_reads(model: nn.Module) -> bool:
    """Whether the modules of a model that are given a TensorDict name all that they read of it.

    Those of tensordict and torchrl do, but for functions and a few. What others wrote may look whether a mask, say, is
    there.
    """
    return all(map(_tells, model.modules()))


def readable_by(module: TensorDictModuleBase, td: TensorDictBase) -> TensorDictBase:
    """What a module reads of a TensorDict; all of it but what comes next, where it does not name what that is."""
    return td.select(*module.in_keys) if tells_what_it_reads(module) else td.exclude("next")


def _tells(module: nn.Module) -> bool:
    if not isinstance(module, TensorDictModuleBase) or getattr(module, "reads_everything", False):
        return True
    if isinstance(module, WrapModule):
        return bool(module.in_keys)
    written_in: str = type(module).forward.__module__
    return written_in.startswith(_KNOWN)


def written_before(model: TensorDictModuleBase) -> dict[NestedKey, frozenset[NestedKey]]:
    """Of each key that a model says it reads, the keys below it that the model writes before it reads them.

    Returns:
        By key; the keys are none for what has to be given as a whole.
    """
    return {key: found for key, found in _reads(model).items() if key in set(map(unravel_key, model.in_keys))}


def _reads(module: nn.Module) -> dict[NestedKey, frozenset[NestedKey]]:
    if not isinstance(module, TensorDictModuleBase):
        return {}
    if not isinstance(module, TensorDictSequential):
        return {unravel_key(key): frozenset() for key in module.in_keys}
    found: dict[NestedKey, frozenset[NestedKey]] = {}
    written: set[NestedKey] = set()
    for part in _parts(module):
        for key, inside in _reads(part).items():
            if key not in written and key not in found:
                found[key] = inside | {other for other in written if is_below(other, key)}
        written |= {unravel_key(key) for key in getattr(part, "out_keys_source", None) or part.out_keys}
    return found


def _parts(sequence: TensorDictSequential) -> Iterable[TensorDictModuleBase]:
    parts = sequence.module
    inside = parts.values() if isinstance(parts, nn.ModuleDict) else parts
    return [part for part in inside if isinstance(part, TensorDictModuleBase)]
