"""Composites, methods and targets from text: what configuration files and the command line say, as values.

A composite is named (``epsilon_plus``), named with parameters (``epsilon_gamma_box:low=-1,high=1``), or written in a
TOML or JSON file as the data of :meth:`tdhook.composites.Composite.from_dict`. A target is ``KEY`` or ``KEY:INDEX``. A
baseline is a number, ``mean``, ``previous``, ``sample:N``, ``blur:WIDTH``, ``@KEY``, or such for each ``KEY=``.
A method is named, likewise with options, or written in a file under ``method``.
Nothing is evaluated and nothing imported: text is data.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.catalogue import METHODS, method_from_dict
from tdhook.composites import PRESETS, Composite, preset
from tdhook.contexts.attribution import Attribution
from tdhook.perturbing.baselines import OneBaseline, blurred
from tdhook.perturbing.features import along, patches
from tdhook.perturbing.players import WHOLE
from tdhook.perturbing.references import References
from tdhook.tables import is_file, parameters_in, shortened, table_in
from tdhook.targets import Key, Target
from tdhook.targets.outputs import Index

__all__ = [
    "baseline_in",
    "read_baseline",
    "read_composite",
    "read_key",
    "read_method",
    "read_target",
    "write_key",
    "write_target",
]

_BASELINES = (
    "a number, mean, previous, sample, sample:N, blur:WIDTH, @KEY for an entry, or such for each KEY="
)
_INDICES = "a number, argmax, action, all, none, or @KEY for the entry that holds it"


def read_composite(text: str | os.PathLike[str]) -> Composite:
    """The composite that a name or a file stands for.

    Args:
        text: name of a preset, with parameters where it needs them (``epsilon_gamma_box:low=-1,high=1``, values as in
            TOML); or path of a file that ends in ``.toml`` or ``.json``.

    What else a file says under ``baseline`` is left to :func:`baseline_in`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: TOML is read on Python 3.10 and ``tomli`` is not installed.
        ValueError: there is no such preset, or what is written makes no composite. The message says where.
    """
    name = os.fspath(text)
    if is_file(name):
        return _from_file(Path(name))
    name, _, parameters = name.partition(":")
    if name not in PRESETS:
        raise ValueError(
            f"no preset is named {name!r}; presets are {', '.join(PRESETS)} (a file ends in .toml or .json)"
        )
    try:
        return preset(name, **(parameters_in(f"preset {name!r}", parameters) if parameters else {}))
    except ValueError as error:
        raise ValueError(f"{error} (parameters are written like epsilon_gamma_box:low=-1,high=1)") from error


def read_method(text: str | os.PathLike[str], **options: object) -> Attribution:
    """The method that a name or a file stands for.

    Args:
        text: a name of :data:`~tdhook.attribution.catalogue.METHODS`, with options as in TOML
            (``integrated_gradients:steps=64,baseline=mean``, text with quotes or without) where it needs them; the name
            of a preset, with its parameters, stands for LRP under it; or path of a ``.toml`` or ``.json`` file that
            says ``method``, and options, as :func:`~tdhook.attribution.catalogue.method_from_dict` takes them, or is a
            composite.
        **options: more of them.

    A ``baseline`` that is text is what :func:`read_baseline` takes; ``features`` are ``whole``, ``patches:SIZE`` or
    ``along:AXIS,...``, as :mod:`tdhook.perturbing.features` has them, lists of numbers, or a table of these by key.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such method, or what is written makes none. The message says where.
    """
    name, _, parameters = os.fspath(text).partition(":")
    if is_file(os.fspath(text)):
        data, where = table_in(Path(text)), f"{text}: "
        if "method" not in data:
            data = {"method": "lrp", "composite": read_composite(text), **_only(data, "baseline")}
    elif name in METHODS:
        data, where = (
            {"method": name, **(parameters_in(f"method {name!r}", parameters) if parameters else {})},
            "",
        )
    elif name in PRESETS:
        data, where = {"method": "lrp", "composite": read_composite(text)}, ""
    else:
        raise ValueError(
            f"no method is named {name!r}; methods are {', '.join(METHODS)}, and the presets {', '.join(PRESETS)}"
        )
    data.update(options)
    baseline = data.get("baseline")
    if isinstance(baseline, str) and baseline not in ("mean", "previous", "sample"):
        data["baseline"] = read_baseline(baseline)
    features = data.get("features")
    if isinstance(features, str):
        data["features"] = _read_features(features)
    elif isinstance(features, Mapping):
        read = {key: _read_features(one) if isinstance(one, str) else one for key, one in features.items()}
        data["features"] = read
    composite = data.get("composite")
    if isinstance(composite, str):
        data["composite"] = read_composite(composite)
    elif isinstance(composite, Mapping):
        data["composite"] = Composite.from_dict(composite)
    try:
        return method_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{where}{shortened(str(error))}") from error


def _read_features(text: str) -> str | Callable[[Sequence[int]], Tensor]:
    name, _, given = text.partition(":")
    try:
        if text == WHOLE:
            return text
        if name == "patches":
            return partial(patches, size=int(given))
        if name == "along":
            return partial(_along, axes=tuple(map(int, given.split(","))))
    except ValueError:
        pass
    raise ValueError(f"features {text!r} are none; they are whole, patches:SIZE or along:AXIS,...")


def _along(shape: Sequence[int], axes: tuple[int, ...]) -> Tensor:
    return along(shape, *axes)


def _only(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: data[name]} if name in data else {}


def _from_file(path: Path) -> Composite:
    data = table_in(path)
    data.pop("baseline", None)
    if not isinstance(data.get("pairs", []), list):
        raise ValueError(f"{path}: 'pairs' is a list of tables, each with 'select' and 'rule'")
    try:
        return Composite.from_dict(data)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:  # data of any shape
        raise ValueError(f"{path} makes no composite: {shortened(str(error))}") from error


def read_target(text: str) -> Target:
    """The target that ``KEY`` or ``KEY:INDEX`` stands for.

    Args:
        text: ``KEY`` is a key of the TensorDict, as :func:`read_key` takes it; ``INDEX`` is one number (or several
            with commas, for the last axes), ``argmax``, ``action``, ``all``, ``none`` (the default), or ``@KEY`` for
            the entry that holds the index.

    Raises:
        ValueError: the text is none of these.
    """
    key, *index = _split(text, ":", 1)
    return Target(read_key(key), _read_index("".join(index), text))


def baseline_in(text: str | os.PathLike[str]) -> str | None:
    """What a composite file says under ``baseline``, as one text; ``None`` where it says nothing.

    That is a number, a text as :func:`read_baseline` takes it, or a table of these by key.

    Args:
        text: as :func:`read_composite` takes it: the name of a preset has no baseline.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these.
    """
    name = os.fspath(text)
    given = table_in(Path(name)).get("baseline") if is_file(name) else None
    if given is None:
        return None
    parts = given if isinstance(given, Mapping) else {"": given}
    if not parts or not all(type(one) in (int, float, str) for one in parts.values()):
        raise ValueError(
            f"{name}: 'baseline' is {shortened(repr(given))}; a baseline is {_BASELINES}, here a table of these"
        )
    return ",".join(f"{key}={one}" if key else f"{one}" for key, one in parts.items())


def read_baseline(text: str) -> References:
    """The references that a text stands for.

    Args:
        text: a number; ``mean`` of the batch; ``previous``, the step before; ``sample`` or ``sample:N``, so many
            elements of the batch; ``blur:WIDTH``, the image out of focus, by a width in pixels; ``@KEY``, an entry of
            the TensorDict; or these for each key, ``pixels=blur:3,speed=0``: keys that are not named stay as they are.

    Raises:
        ValueError: the text is none of these.
    """
    parts = text.split(",")
    if "=" not in text:
        return _as_references([_read_baseline(text, text)])
    named = [part.partition("=") for part in parts]
    if not all(equals for _, equals, _ in named):
        raise ValueError(f"baseline {text!r} is one for each key, like pixels=blur:3,speed=0, or one for all")
    keys = [read_key(key) for key, _, _ in named]
    if len(set(keys)) < len(keys):
        raise ValueError(f"baseline {text!r} names a key twice")
    return _as_references([_read_baseline(one, text) for _, _, one in named], keys)


def _as_references(read: list[tuple[OneBaseline, int]], keys: list[NestedKey] | None = None) -> References:
    baselines = [baseline for baseline, _ in read]
    samples = max(count for _, count in read)
    return References(baselines[0] if keys is None else dict(zip(keys, baselines, strict=True)), samples)


def _read_baseline(text: str, whole: str) -> tuple[OneBaseline, int]:
    """A baseline, and how many of it are drawn."""
    name, _, parameter = text.partition(":")
    if text in ("mean", "previous", "sample"):
        return text, 1
    if text.startswith("@"):
        key = read_key(text[1:])
        return (key,) if isinstance(key, str) else key, 1
    try:
        if name == "sample" and int(parameter) > 0:
            return "sample", int(parameter)
        number = float(parameter if name == "blur" else text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (name == "blur" and number <= 0):
        raise ValueError(f"baseline {whole!r} has {text!r} in it; a baseline is {_BASELINES}")
    return blurred(number) if name == "blur" else number, 1


def read_key(text: str) -> NestedKey:
    """The key of a TensorDict that ``agents.logits`` (nested) or ``logits`` stands for.

    A dot or colon that is part of a name has a backslash before it, as a backslash has.

    Raises:
        ValueError: a part of it is empty.
    """
    parts = tuple(re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in _split(text, "."))
    if not all(parts):
        raise ValueError(
            f"{text!r} names no key: a key is a name, or several with dots where nested, like agents.logits"
        )
    return parts[0] if len(parts) == 1 else parts


def _split(text: str, separator: str, most: int = -1) -> list[str]:
    """Parts of a text, where no backslash stands before what separates them; from the left, ``most`` times at most."""
    parts = [""]
    for piece in re.findall(r"\\.|.", text, flags=re.DOTALL):
        if piece == separator and len(parts) != most + 1:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _read_index(text: str, whole: str) -> Index:
    if text in ("", "none"):
        return None
    if text in ("argmax", "action", "all"):
        return text
    if text.startswith("@"):
        return Key(read_key(text[1:]))
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"target {whole!r} has the index {text!r}; an index is {_INDICES}") from None
    return numbers[0] if len(numbers) == 1 else numbers


def write_target(target: Target) -> str:
    """The text that :func:`read_target` makes this target of.

    Raises:
        TypeError: the index is a tensor or a list, which has no short text.
    """
    index = target.index
    if index is None:
        return write_key(target.key)
    if isinstance(index, Key):
        return f"{write_key(target.key)}:@{write_key(index.key)}"
    if isinstance(index, int | str):
        return f"{write_key(target.key)}:{index}"
    if isinstance(index, tuple):
        numbers = all(isinstance(part, int) for part in index)
        return f"{write_key(target.key)}:{','.join(map(str, index)) if numbers else '@' + write_key(index)}"
    raise TypeError(f"a target whose index is a {type(index).__name__.lower()} cannot be written as text")


def write_key(key: NestedKey) -> str:
    """The text that :func:`read_key` makes this key of."""
    parts = (key,) if isinstance(key, str) else key
    return ".".join(re.sub(r"([\\.:])", r"\\\1", part) for part in parts)
