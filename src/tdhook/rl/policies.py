"""Policies as plain-data checkpoints, and the environments they act in.

A checkpoint holds numbers, strings and tensors only: it is read with ``weights_only=True``, so that opening
someone else's file never runs their code. The actor is built anew from the architecture that the file names.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook.extras import require
from tdhook.files import write_whole
from tdhook.rl import environments

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

FORMAT = 1
"""Version of the checkpoint format that this module reads and writes."""

_REQUIRED = ("env", "kind", "architecture", "features", "actions", "state_dict")
_ACTIVATIONS = {cls.__name__: cls for cls in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh)}


@dataclass(frozen=True)
class Policy:
    """An actor, the environment that it was trained for, and names for what it sees and does.

    Args:
        actor: reads ``observation``, or ``pixels``, and writes ``action`` (one-hot) beside what led to it.
        env_id: gymnasium id of the environment.
        features: one name per entry of the observation, or per channel of an image.
        actions: one name per action.
        metadata: plain data; ``kind`` and ``architecture`` (see :func:`build_actor`) say how to build the actor
            again, ``options`` and ``preprocessing`` (see :func:`make_env`) how to make its environment; whatever else
            is in it (seed, frames, evaluation) is kept with it.
    """

    actor: TensorDictModule
    env_id: str
    features: tuple[str, ...]
    actions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def build_actor(kind: str, architecture: Mapping[str, Any]) -> TensorDictModule:
    """An untrained actor with one-hot actions.

    Args:
        kind: how it acts, and of what it is made. ``"dqn_..."`` is a greedy Q-value actor that writes ``action_value``
            and ``action`` ``[*batch, out_features]`` and ``chosen_action_value [*batch, 1]``; ``"ppo_..."`` is a
            categorical actor that writes ``logits`` and ``action`` ``[*batch, out_features]``, and takes the most
            probable action, unless torchrl's exploration type asks for a sample. ``"..._mlp"`` reads ``observation
            [*batch, in_features]``; ``"..._cnn"`` reads ``pixels [*batch, channels, height, width]``.
        architecture: of the multi-layer perceptron: ``in_features`` and ``out_features`` (integers),
            ``num_cells`` (a list with the width of each hidden layer), ``activation`` (a class of ``torch.nn``). With
            convolutions before it (``"..._cnn"``), ``in_shape`` (channels, height, width) instead of ``in_features``,
            and of each convolution ``channels``, ``kernel_sizes`` and ``strides`` (lists), as in the network of Mnih
            et al. 2015.

    Raises:
        ImportError: torchrl is not installed.
        ValueError: the kind, an entry of the architecture or the activation is unknown, or an entry is missing, or
            convolutions and image do not fit together.
    """
    head, _, body = kind.partition("_")
    if head not in _HEADS or body not in _BODIES:
        known = [f"{head}_{body}" for head in _HEADS for body in _BODIES]
        raise ValueError(f"unknown kind of policy {kind!r}: this version of tdhook builds {_listed(known)}")
    key, expected, build = _BODIES[body]
    if set(architecture) != set(expected):
        raise ValueError(
            f"the architecture of a {kind} has the entries {_listed(expected)}, not {_listed(architecture)}"
        )
    if architecture["activation"] not in _ACTIVATIONS:
        raise ValueError(
            f"unknown activation {architecture['activation']!r}: choose one of {_listed(_ACTIVATIONS)}"
        )
    return _HEADS[head](build(architecture), key, architecture["out_features"])


def _mlp(architecture: Mapping[str, Any]) -> nn.Module:
    network: nn.Module = require("torchrl.modules", "tdhook.rl").MLP(
        in_features=architecture["in_features"],
        out_features=architecture["out_features"],
        num_cells=list(architecture["num_cells"]),
        activation_class=_ACTIVATIONS[architecture["activation"]],
    )
    return network


def _cnn(architecture: Mapping[str, Any]) -> nn.Module:
    modules = require("torchrl.modules", "tdhook.rl")
    channels, kernels, strides = (
        list(architecture[entry]) for entry in ("channels", "kernel_sizes", "strides")
    )
    if not len(channels) == len(kernels) == len(strides) > 0:
        raise ValueError(
            f"each convolution has channels, a kernel size and a stride, got {channels}, {kernels} and {strides}"
        )
    planes, *sides = architecture["in_shape"]
    for kernel, stride in zip(kernels, strides, strict=True):
        sides = [(side - kernel) // stride + 1 for side in sides]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(
            f"the convolutions leave nothing of an image of in_shape={architecture['in_shape']} "
            "(channels, height, width)"
        )
    activation = _ACTIVATIONS[architecture["activation"]]
    convolutions = modules.ConvNet(
        in_features=planes,
        num_cells=channels,
        kernel_sizes=kernels,
        strides=strides,
        activation_class=activation,
    )
    return nn.Sequential(
        convolutions, _mlp({**architecture, "in_features": channels[-1] * sides[0] * sides[1]})
    )


def _q_value_actor(network: nn.Module, key: str, n_actions: int) -> TensorDictModule:
    spec = require("torchrl.data", "tdhook.rl").OneHot(n_actions)
    return require("torchrl.modules", "tdhook.rl").QValueActor(network, in_keys=[key], spec=spec)


def _categorical_actor(network: nn.Module, key: str, n_actions: int) -> TensorDictModule:
    modules = require("torchrl.modules", "tdhook.rl")
    return modules.ProbabilisticActor(
        TensorDictModule(network, in_keys=[key], out_keys=["logits"]),
        in_keys=["logits"],
        spec=require("torchrl.data", "tdhook.rl").OneHot(n_actions),
        distribution_class=modules.OneHotCategorical,
    )


_HEADS: dict[str, Callable[[nn.Module, str, int], TensorDictModule]] = {
    "dqn": _q_value_actor,
    "ppo": _categorical_actor,
}
_PERCEPTRON = ("out_features", "num_cells", "activation")
_BODIES: dict[str, tuple[str, tuple[str, ...], Callable[[Mapping[str, object]], nn.Module]]] = {
    "mlp": ("observation", ("in_features", *_PERCEPTRON), _mlp),
    "cnn": ("pixels", ("in_shape", "channels", "kernel_sizes", "strides", *_PERCEPTRON), _cnn),
}


def load_policy(path: str | os.PathLike[str], env_id: str | None = None) -> Policy:
    """Read a policy that :func:`save_policy` wrote.

    Args:
        path: of the file. Anyone's can be read: it is data, and neither it nor what it names is run.
        env_id: gymnasium id of the environment, instead of the one in the file. One that imports a module
            (``"module:Name-v0"``) is taken from here alone.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: torchrl is not installed.
        ValueError: the file is not a checkpoint of tdhook, its format or kind is unknown to this version, or its
            parts do not fit together. The message names the file and the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no policy checkpoint at {path}: give the path of a file that tdhook.rl.save_policy wrote "
            "(examples/train_cartpole.py makes one)"
        )
    return _from_bytes(path.read_bytes(), path, env_id)


def save_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Write a policy as plain data, after making sure that it can be read back.

    Args:
        policy: ``policy.actor`` must have the structure that :func:`build_actor` gives for the kind and architecture
            in ``policy.metadata``.
        path: file to write, whole or not at all; missing folders are made.

    Raises:
        ValueError: what was given does not make a checkpoint that loads. Nothing is written then.
    """
    path = Path(path)
    try:
        network = policy.actor[0].module
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"cannot save a {type(policy.actor).__name__} to {path}: build it with build_actor"
        ) from error
    checkpoint = {
        **policy.metadata,
        "format": FORMAT,
        "env": policy.env_id,
        "features": list(policy.features),
        "actions": list(policy.actions),
        # The network's own names ("0.weight", ...), so that plain torch can read the file without torchrl.
        "state_dict": {name: value.detach().cpu().clone() for name, value in network.state_dict().items()},
    }
    buffer = io.BytesIO()
    try:
        torch.save(checkpoint, buffer)
        again = _from_bytes(buffer.getvalue(), path).actor[0].module
    except ImportError:
        raise
    except Exception as error:  # metadata can hold anything, and so fail in any way
        raise ValueError(f"nothing was saved, since it would not load again: {error}") from error
    # Layers without weights (a different activation, say) do not show in the state dict.
    if [str(layer) for layer in again.children()] != [str(layer) for layer in network.children()]:
        raise ValueError(
            f"nothing was saved to {path}: the actor's network is {network}, "
            f"and its metadata says {policy.metadata['architecture']}"
        )
    write_whole(path, buffer.getvalue())


def demo_policy(name: str = "cartpole") -> Policy:
    """A policy that comes with tdhook.

    Args:
        name: ``"cartpole"``, a double DQN for CartPole-v1 that ``examples/train_cartpole.py`` trained; or
            ``"freeway"``, which sees the pixels of ALE/Freeway-v5 (its environment needs ale-py) and was trained by
            ``examples/agents/atari.py``.

    Raises:
        ValueError: there is no policy of this name.
    """
    if name not in _DEMOS:
        raise ValueError(f"no policy {name!r} comes with tdhook: there are {_listed(_DEMOS)}")
    with resources.as_file(resources.files("tdhook.rl") / "checkpoints" / _DEMOS[name]) as path:
        return load_policy(path)


_DEMOS = {"cartpole": "cartpole_dqn.pt", "freeway": "freeway_ppo.pt"}


def make_env(
    env: str | Policy,
    seed: int | None = None,
    render: bool = False,
    *,
    options: Mapping[str, object] | None = None,
    preprocessing: Iterable[Mapping[str, object]] | None = None,
) -> EnvBase:
    """A gymnasium environment as torchrl sees it, with one-hot actions and float32 observations.

    Args:
        env: gymnasium id, as ``"CartPole-v1"``, ``"ALE/Pong-v5"`` (which takes ale-py) or ``"MinAtar/Breakout-v1"``
            (MinAtar); or a policy: then what its metadata says under ``"options"`` and ``"preprocessing"`` holds,
            unless given here.
        seed: of the environment's own random numbers. Sampled actions follow :func:`torch.manual_seed`.
        render: whether it can be rendered to pictures, ``env.render()``.
        options: what :func:`gymnasium.make` takes beside the id.
        preprocessing: transforms as plain data, the first one first: each a mapping with its class under
            ``"transform"`` (``"CatFrames"``, ``"DTypeCastTransform"``, ``"ObservationNorm"``, ``"PermuteTransform"``,
            ``"ToTensorImage"`` or ``"UnsqueezeTransform"`` of torchrl, or
            ``"CropAndPool"``, :class:`tdhook.rl.frames.CropAndPool`) and arguments of this class under their names.

    Raises:
        ImportError: torchrl, gymnasium or a package that this environment needs is not installed.
        ValueError: gymnasium knows no such environment, or a step of the preprocessing does not work.
    """
    env_id, metadata = (env.env_id, env.metadata) if isinstance(env, Policy) else (env, {})
    chosen = dict(metadata.get("options", {}) if options is None else options)
    if render:
        chosen["render_mode"] = "rgb_array"
    made = environments.make(
        env_id, chosen, metadata.get("preprocessing", ()) if preprocessing is None else preprocessing
    )
    if seed is not None:
        made.set_seed(seed)
    return made


def _from_bytes(data: bytes, path: Path, env_id: str | None = None) -> Policy:
    """The policy in the bytes of a checkpoint; ``path`` is for messages."""
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways; all mean the same to whoever gave the file
        raise ValueError(
            f"{path} is not a policy checkpoint of tdhook: it does not load as plain data ({type(error).__name__}). "
            "Write it with tdhook.rl.save_policy, which keeps numbers, strings and tensors only"
        ) from error
    damaged = _damaged(data)
    if damaged is not None:
        raise ValueError(
            f"{path} was changed or damaged after it was written: its part {damaged!r} has another checksum. "
            "Get it once more, or train the policy again"
        )
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(
            f"{path} is not a policy checkpoint of tdhook: it has no 'format' entry. If it holds bare weights, load "
            "them into the network of tdhook.rl.build_actor and write that with tdhook.rl.save_policy"
        )
    if type(checkpoint["format"]) is not int or checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']!r}, and this version of tdhook reads format {FORMAT}: "
            "use the version of tdhook that wrote it, or train the policy again"
        )
    missing = [name for name in _REQUIRED if name not in checkpoint]
    if missing:
        raise ValueError(
            f"{path} is an incomplete policy checkpoint, without {_listed(missing)}: "
            "write it with tdhook.rl.save_policy"
        )
    try:
        actor = build_actor(checkpoint["kind"], checkpoint["architecture"])
        _check_names(checkpoint)
        _check_environment(checkpoint, env_id)
        actor[0].module.load_state_dict(checkpoint["state_dict"])
    except ImportError:
        raise
    except Exception as error:  # wrong types inside the file fail as they please
        raise ValueError(
            f"{path} does not make a policy: {error}. Use the version of tdhook that wrote it, or write it again "
            "with tdhook.rl.save_policy"
        ) from error
    names = {"format", "env", "features", "actions", "state_dict"}
    return Policy(
        actor=actor.eval(),
        env_id=checkpoint["env"] if env_id is None else env_id,
        features=tuple(checkpoint["features"]),
        actions=tuple(checkpoint["actions"]),
        metadata={key: value for key, value in checkpoint.items() if key not in names},
    )


def _damaged(data: bytes) -> str | None:
    """The part of a checkpoint, a zip archive, that is not as it was written; torch reads it without a word."""
    if not zipfile.is_zipfile(io.BytesIO(data)):  # what torch wrote until 2020
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.testzip()


def _check_names(checkpoint: Mapping[str, Any]) -> None:
    architecture = checkpoint["architecture"]
    if "in_shape" in architecture:
        size, seen = "in_shape[0]", architecture["in_shape"][0]
    else:
        size, seen = "in_features", architecture["in_features"]
    acts = architecture["out_features"]
    for entry, name, wanted in (("features", size, seen), ("actions", "out_features", acts)):
        require_names(checkpoint[entry], entry)
        given = len(checkpoint[entry])
        if given != wanted:
            raise ValueError(f"it names {given} {entry}, and its architecture has {name}={wanted}")


def require_names(names: Iterable[object], what: str) -> None:
    """Make sure that names tell things apart.

    Args:
        names: of features, say.
        what: they are.

    Raises:
        TypeError: one is no text.
        ValueError: two are equal.
    """
    listed = list(names)
    for place, name in enumerate(listed):
        if not isinstance(name, str):
            raise TypeError(f"{what}[{place}] is {name!r}, and a name is a string")
        if listed.index(name) < place:
            raise ValueError(f"{what} have the name {name!r} twice, which does not tell them apart")


def _check_environment(checkpoint: Mapping[str, Any], env_id: str | None) -> None:
    """What a file says of its environment is a name and plain data: nothing that would be imported."""
    given = checkpoint["env"]
    if not isinstance(given, str):
        raise TypeError(f"its 'env' is {given!r}, and an environment has an id, a string")
    options, steps = checkpoint.get("options", {}), checkpoint.get("preprocessing", ())
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"its 'options' are {options!r}, and they are a table")
    if not isinstance(steps, list | tuple) or not all(isinstance(step, dict) for step in steps):
        raise TypeError(f"its 'preprocessing' is {steps!r}, and that is a list of tables")
    if env_id is None:
        environments.require_no_import(given, options)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)
