"""Identity: what a job explains, and how, as plain data that is the same in every process and on every machine.

Two workers explain the same only if they have the same weights, the same method and the same source. Each says what it
has as plain data, and numbers that are too many by their digest, so that what differs can be named.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook.keys import parts_of

__all__ = ["Plain", "described", "difference", "digest_of", "module_identity"]

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What JSON can say."""

_BYTES = 16


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A digest of the bytes of tensors, whatever device they are on."""
    found = hashlib.blake2b(digest_size=_BYTES)
    for x in tensors:
        dense = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if dense.numel():
            found.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digest_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_BYTES).hexdigest()


def described(value: object) -> Plain:
    """A value as plain data: numbers as they are, tensors and code by their digest, objects by what they hold.

    Raises:
        ValueError: it holds itself.
    """
    return _described(value, ())


def _described(value: object, above: tuple[int, ...]) -> Plain:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)  # JSON has no infinity
    if id(value) in above:
        raise ValueError(f"a {type(value).__name__} that holds itself cannot be written down as data")
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "digest": digest_of([value])}
    if isinstance(value, nn.Module):
        return module_identity(value)
    if isinstance(value, TensorDictBase):
        entries = sorted(value.items(True, True), key=lambda entry: parts_of(entry[0]))
        return {".".join(parts_of(key)): _described(one, above) for key, one in entries}
    if isinstance(value, Mapping):
        return {_name(key): _described(one, above) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_described(one, above) for one in value), key=repr)
    if isinstance(value, Sequence):
        return [_described(one, above) for one in value]
    return _of_object(value, above)


def _of_object(value: object, above: tuple[int, ...]) -> Plain:
    if isinstance(value, torch.dtype | torch.device | PurePath | slice):
        return str(value)
    if isinstance(value, type):
        return _qualified(value)
    if isinstance(value, partial):
        return {
            "partial": _described(value.func, above),
            "with": _described([value.args, value.keywords], above),
        }
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": _described(value.__self__, above)}
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [one for one in cells if one is not value]
        return {
            "function": _qualified(value),
            "code": _digest_of_text(_code(value.__code__)),
            "with": _described([held, value.__defaults__ or ()], above),
        }
    if callable(value) and hasattr(value, "__name__") and not hasattr(value, "__dict__"):
        return {"function": str(value.__name__)}
    held_in = _held(value)
    return {
        "class": _qualified(type(value)),
        **{name: _described(one, above) for name, one in held_in.items()},
    }


def _held(value: object) -> dict[str, object]:
    """The attributes of an object, but what a class works out of the others."""
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    return {name: one for name, one in sorted(found.items()) if not isinstance(one, types.ModuleType)}


def _code(code: types.CodeType) -> str:
    constants = [_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, constants))


def _qualified(value: type | types.FunctionType) -> str:
    # A process that was started to work has the user's script under another name.
    module = "__main__" if value.__module__ == "__mp_main__" else value.__module__
    return f"{module}.{value.__qualname__}"


def _name(key: object) -> str:
    return (
        ".".join(key) if isinstance(key, tuple) and all(isinstance(part, str) for part in key) else str(key)
    )


def module_identity(module: nn.Module) -> dict[str, Plain]:
    """Which model it is: its classes and settings, and the digest of its weights, buffers included."""
    makeup = [
        [path, _qualified(type(part)), part.training, _settings(part)]
        for path, part in module.named_modules(remove_duplicate=False)
    ]
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    shapes = [[name, list(x.shape), str(x.dtype)] for name, x in tensors]
    return {
        "class": _qualified(type(module)),
        "makeup": _digest_of_text(repr(makeup)),
        "shapes": _digest_of_text(repr(shapes)),
        "weights": digest_of(x for _, x in tensors),
    }


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    plain = (bool, int, float, str, type(None))
    found = []
    for name, value in sorted(vars(module).items()):
        flat = value if isinstance(value, tuple | list) else (value,)
        if not name.startswith("_") and name != "training" and all(isinstance(one, plain) for one in flat):
            found.append((name, repr(value)))
    return found


def difference(ours: Plain, theirs: Plain, at: str = "") -> str | None:
    """The first place where plain data differ, as ``place: this and not that``; ``None`` where they are the same."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in dict.fromkeys([*theirs, *ours]):
            place = f"{at}.{name}" if at else name
            if name not in ours or name not in theirs:
                return f"{place}: {_short(ours.get(name))} and not {_short(theirs.get(name))}"
            found = difference(ours[name], theirs[name], place)
            if found is not None:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{at}[{i}]") for i, (a, b) in pairs)), None)
    # JSON knows one kind of number, and no tuple.
    return None if ours == theirs else f"{at}: {_short(ours)} and not {_short(theirs)}"


def _short(value: Plain) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
