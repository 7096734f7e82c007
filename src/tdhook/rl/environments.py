"""Gymnasium environments as torchrl sees them, and their transforms from plain data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from tdhook.extras import require

if TYPE_CHECKING:
    from torchrl.envs import EnvBase, Transform

_REGISTER = {"ALE/": ("ale_py", "ale-py"), "MinAtar/": ("minatar.gym", "MinAtar")}
"""Environments that gymnasium learns of from a package: how their ids begin, its module, and what to install."""

_TRANSFORMS = (
    "CatFrames",
    "DTypeCastTransform",
    "ObservationNorm",
    "PermuteTransform",
    "ToTensorImage",
    "UnsqueezeTransform",
)
_NAMES_CODE = ("backend", "env", "env_id", "env_name", "entry_point", "id", "vector_entry_point")
_WORDS = re.compile(r"[\w -]*")


def make(env_id: str, options: Mapping[str, object], preprocessing: Iterable[Mapping[str, Any]]) -> EnvBase:
    """An environment with its transforms; see :func:`tdhook.rl.make_env`."""
    envs, gymnasium = require("torchrl.envs", "tdhook.rl"), require("gymnasium", "tdhook.rl")
    _register(env_id, gymnasium)
    try:
        env = envs.GymEnv(env_id, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"environment {env_id!r} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(
            f"cannot make environment {env_id!r}: {error} (gymnasium.pprint_registry() lists what is there)"
        ) from error
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:  # what it says of its options
        raise ValueError(
            f"cannot make environment {env_id!r} with the options {dict(options)}: {error}"
        ) from error
    steps = [_transform(step) for step in preprocessing]
    # Some environments observe in float64; a policy's weights are float32.
    wide = [key for key, spec in env.observation_spec.items(True, True) if spec.dtype == torch.float64]
    if wide:
        steps.insert(0, envs.DoubleToFloat(in_keys=wide))
    return envs.TransformedEnv(env, envs.Compose(*steps)) if steps else env


def require_no_import(env_id: str, options: Mapping[str, object]) -> None:
    """Make sure that an environment of which a file tells is a registered one, made with plain data.

    gymnasium imports what stands before a colon, and torchrl the ``backend``: a file may not say that.

    Raises:
        ValueError: something would be imported. The message says how to have it all the same.
    """
    home, colon, _ = env_id.rpartition(":")
    if colon:
        raise ValueError(
            f"its environment {env_id!r} would import the module {home!r}, and what a file names is not imported: if "
            f"you trust the module, name it yourself, with --env {env_id} or load_policy(..., env_id={env_id!r})"
        )
    for key, value in options.items():
        if key in _NAMES_CODE or not _is_plain(value):
            raise ValueError(
                f"its option {key!r} is {value!r}: options of an environment that come from a file are numbers, words "
                "and lists of them, and name no module or path; give others to make_env(policy, options=...)"
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return _WORDS.fullmatch(value) is not None
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float)


def _transform(step: Mapping[str, object]) -> Transform:
    """One step of preprocessing: the class that ``"transform"`` names, with the other entries as its arguments."""
    options = dict(step)
    name = options.pop("transform", None)
    if name == "CropAndPool":
        found = importlib.import_module("tdhook.rl.frames").CropAndPool
    elif name in _TRANSFORMS:
        found = getattr(require("torchrl.envs", "tdhook.rl"), name)
    else:
        known = ", ".join(map(repr, sorted((*_TRANSFORMS, "CropAndPool"))))
        raise ValueError(
            f"a step of preprocessing names one of {known} as its 'transform', got {name!r}; append any other "
            "transform to the environment: TransformedEnv(make_env(...), transform)"
        )
    if name == "DTypeCastTransform":  # a dtype is written by its name
        options |= {key: _dtype(options[key]) for key in ("dtype_in", "dtype_out") if key in options}
    try:
        return found(**options)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the step of preprocessing {dict(step)} does not work: {error}") from error


def _dtype(name: object) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch; write it as 'float32'")
    return dtype


def _register(env_id: str, gymnasium: ModuleType) -> None:
    for start, (module, package) in _REGISTER.items():
        if not env_id.startswith(start) or env_id in gymnasium.registry:
            continue
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ImportError(
                f"environment {env_id!r} needs {package}, which is not installed: pip install {package}"
            ) from error
        if module == "ale_py":
            gymnasium.register_envs(found)  # importing it has registered its environments
        elif env_id not in gymnasium.registry:
            found.register_envs()
