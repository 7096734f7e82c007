"""Identity: what a job explains, and how, as plain data that is the same in every process and on every machine.

Two workers explain the same only if they have the same weights, the same method and the same source. Each says what it
has as plain data, and numbers that are too many by their digest, so that what differs can be named.
"""

from __future__ import annotations

import copyreg
import dis
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook.keys import parts_of
from tdhook.models.holding import modules_of
from tdhook.models.state import LIBRARIES, slots_of
from tdhook.tape.internals import components_of

__all__ = ["Plain", "bytes_of", "described", "difference", "digest_of", "module_identity"]

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What JSON can say."""

_BYTES = 16
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, partial)
_DEEPEST = 16
_MACHINERY = frozenset(vars(nn.Module())) | {"forward", "_prev_forward", "_flat_weights", "_flat_weight_refs"}
"""Attributes of every module, and those in which it has its parameters once more."""


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A digest of the bytes of tensors, whatever device they are on; on the device "meta" there are none."""
    found = hashlib.blake2b(digest_size=_BYTES)
    for x in tensors:
        if x.is_meta:  # multi-agent networks keep the shape of their network so, and its weights elsewhere
            continue
        for part in components_of(x):
            found.update(bytes_of(part))
    return found.hexdigest()


def bytes_of(value: Tensor) -> memoryview:
    """The bytes of a tensor."""
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not dense.numel():
        return memoryview(b"")
    # A single number counts as contiguous whatever its stride is, with which no bytes can be made of it.
    flat: memoryview = dense.reshape(-1).as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
    return flat


def _digest_of_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_BYTES).hexdigest()


def _digest_of_text(text: str) -> str:
    return _digest_of_bytes(text.encode())


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
    if isinstance(value, bytes | bytearray):
        return {"bytes": len(value), "digest": _digest_of_bytes(bytes(value))}
    if id(value) in above:
        if isinstance(value, types.FunctionType):  # which calls itself, or one that calls it
            return {"function": _qualified(value)}
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
        given = [cells, value.__defaults__ or (), value.__kwdefaults__ or {}, _looked_up(value)]
        return {
            "function": _qualified(value),
            "code": _digest_of_text(_code(value.__code__)),
            "with": _described(given, above),
        }
    if callable(value) and hasattr(value, "__name__") and not hasattr(value, "__dict__"):
        return {"function": str(value.__name__)}
    kind, held_in = type(value), _held(value)
    if not held_in:
        return {"class": _qualified(kind), "made of": _described(_made_of(value), above)}
    written = _written(kind)
    return {
        "class": _qualified(kind),
        **({"code": written} if written else {}),
        **{name: _described(one, above) for name, one in held_in.items()},
    }


def _made_of(value: object) -> list[object]:
    """What a copy of an object is made of that has no attributes: a number or an array of numpy, a pattern, a date."""
    reduce: Callable[[object], object] | None = copyreg.dispatch_table.get(type(value))
    try:
        made = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except TypeError:  # a lock, say
        return []
    return [one for one in made[1:3] if one is not None] if isinstance(made, tuple) else [made]


def _looked_up(function: types.FunctionType) -> dict[str, object]:
    """What a function finds by name in its module, and does not set: numbers, tensors, models, functions beside it."""
    loaded: set[str] = set()
    stored: set[str] = set()
    for one in _instructions(function.__code__):
        if one.opname == "LOAD_GLOBAL":
            loaded.add(one.argval)
        elif one.opname == "STORE_GLOBAL":
            stored.add(one.argval)
    known = function.__globals__
    found = {name: known[name] for name in sorted(loaded - stored) if name in known and name[:2] != "__"}
    return {name: one for name, one in found.items() if _decides(one, known)}


def _decides(value: object, known: Mapping[str, object]) -> bool:
    """Whether a value of a module is told: not what changes by itself, as a list that is added to."""
    if isinstance(value, types.FunctionType):
        return value.__globals__ is known
    return isinstance(value, nn.Module) or (
        _is_told(value) and not isinstance(value, list | dict | set | TensorDictBase)
    )


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _instructions(one)


def _is_told(value: object, depth: int = _DEEPEST) -> bool:
    """Whether a value is data or code, which is the same in every process."""
    if isinstance(value, (*_NUMBERS, *_FUNCTIONS, Tensor, TensorDictBase)):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(_is_told(one, depth - 1) for one in value)
    if isinstance(value, dict):
        return _is_told([*value], depth) and _is_told([*value.values()], depth)
    return type(value).__module__ == "numpy"


def _written(kind: type) -> str:
    """The digest of the code of a class, as far as it is the user's; nothing where none of it is."""
    texts = [
        (name, _code(inspect.unwrap(one).__code__))
        for cls in kind.__mro__
        if cls.__module__.partition(".")[0] not in LIBRARIES | {"tdhook"}
        for name, one in sorted(vars(cls).items())
        if isinstance(one, types.FunctionType)
    ]
    return _digest_of_text(repr(texts)) if texts else ""


def _held(value: object) -> dict[str, object]:
    """The attributes of an object, but what a class works out of the others."""
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    return {name: one for name, one in sorted(found.items()) if not isinstance(one, types.ModuleType)}


def _code(code: types.CodeType) -> str:
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, _constant(code.co_consts)))


def _constant(value: object) -> str:
    """A constant of code; ``x in {"a", "b"}`` has a set, whose order is another in each process."""
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_constant, value))}"
    return repr(list(map(_constant, value))) if isinstance(value, tuple) else repr(value)


def _qualified(value: type | types.FunctionType) -> str:
    # A process that was started to work has the user's script under another name.
    module = "__main__" if value.__module__ == "__mp_main__" else value.__module__
    return f"{module}.{value.__qualname__}"


def _name(key: object) -> str:
    return (
        ".".join(key) if isinstance(key, tuple) and all(isinstance(part, str) for part in key) else str(key)
    )


def module_identity(module: nn.Module) -> dict[str, Plain]:
    """Which model it is: its classes, their code if it is the user's, settings, and the digest of its weights.

    Weights are all tensors that its modules hold, buffers included, and those of modules that it does not register.
    """
    parts = modules_of(module)
    makeup = [
        [path, _qualified(type(part)), _written(type(part)), part.training, _settings(part)]
        for path, part in parts.items()
    ]
    tensors = [(name, registry[name]) for registry, name in slots_of(parts.values())]
    shapes = [[name, list(x.shape), str(x.dtype)] for name, x in tensors]
    return {
        "class": _qualified(type(module)),
        "makeup": _digest_of_text(repr(makeup)),
        "shapes": _digest_of_text(repr(shapes)),
        "weights": digest_of(x for _, x in tensors),
    }


def _settings(module: nn.Module) -> list[tuple[str, Plain]]:
    """What a module holds besides tensors and modules, as far as it is data or code."""
    if isinstance(module, TensorDictBase):  # TensorDictParams: tensors, and how it keeps them
        return []
    return [
        (name, described(value))
        for name, value in sorted(vars(module).items())
        if name not in _MACHINERY and not isinstance(value, Tensor) and _is_told(value)
    ]


def difference(ours: Plain, theirs: Plain, at: str = "") -> str | None:
    """The first place where plain data differ, as ``place: this and not that``; ``None`` where they are the same."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in dict.fromkeys([*theirs, *ours]):
            place = f"{at}.{name}" if at else name
            if name not in ours or name not in theirs:
                return f"{place}: {_told_apart(ours.get(name), theirs.get(name))}"
            found = difference(ours[name], theirs[name], place)
            if found is not None:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{at}[{i}]") for i, (a, b) in pairs)), None)
    # JSON knows one kind of number, and no tuple.
    return None if ours == theirs else f"{at}: {_told_apart(ours, theirs)}"


def _told_apart(ours: Plain, theirs: Plain) -> str:
    """Both as text; what is long, from shortly before they part."""
    texts = repr(ours), repr(theirs)
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return " and not ".join(_short(text, max(0, same - 20)) for text in texts)


def _short(text: str, begin: int) -> str:
    if len(text) <= 80:
        return text
    text = text if begin < 4 else f"...{text[begin:]}"
    return text if len(text) <= 80 else f"{text[:77]}..."
