"""The policy that a command was given, a checkpoint or an import path, and where it acts."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key

from tdhook.configuration import write_key
from tdhook.rl import Policy, load_policy, make_env
from tdhook.rl.policies import require_names
from tdhook.targets import Target

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

__all__ = ["Stage", "default_target", "find_policy", "imported", "is_imported"]

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def find_policy(text: str, env_id: str | None = None, *, need_env: bool = True) -> Policy:
    """The policy that a checkpoint holds or that a function returns.

    Args:
        text: path of a checkpoint, or ``package.module:function``; modules in the working directory are found, too.
        env_id: environment to act in, instead of the policy's own.
        need_env: whether there must be one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ImportError: the module or its function is not there.
        TypeError: the function returns no policy.
        ValueError: the file is no checkpoint, or no environment is known.
    """
    policy = _imported(text) if is_imported(text) else load_policy(text, env_id)
    if env_id is not None:
        policy = replace(policy, env_id=env_id)
    for names, what in ((policy.features, "features"), (policy.actions, "actions")):
        require_names(names, f"{text}: {what}")
    if need_env and not policy.env_id:
        raise ValueError(
            f"{text} does not say in which environment it acts: give --env, as in --env CartPole-v1"
        )
    return policy


def is_imported(text: str) -> bool:
    """Whether a policy is taken from a module, ``package.module:function``, and not read from a file."""
    return _IMPORT_PATH.fullmatch(text) is not None and not Path(text).exists()


def _imported(text: str) -> Policy:
    function = imported(text, "--policy takes a function that returns the policy")
    try:
        made = function()
    except Exception as error:  # the user's own code fails as it pleases
        raise ValueError(f"{text} raised {type(error).__name__}: {error}") from error
    if isinstance(made, Policy):
        return made
    if isinstance(made, TensorDictModuleBase):
        return Policy(made.eval(), env_id="", features=(), actions=())
    raise TypeError(
        f"{text} returned {type(made).__name__}, and a policy is a TensorDictModule or a tdhook.rl.Policy; "
        'wrap a plain module: TensorDictModule(module, in_keys=["observation"], out_keys=["action"])'
    )


def imported(text: str, what: str) -> Any:
    """The function that ``package.module:function`` names.

    Args:
        text: the name.
        what: what takes which function, for the message.

    Raises:
        ImportError: it is not there.
        TypeError: it is no function.
        ValueError: it is named otherwise, or its module cannot be imported.
    """
    if _IMPORT_PATH.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not written as package.module:function")
    home, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not look there, and `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{home}.".startswith(f"{error.name}."):
            raise ImportError(
                f"there is no module {home!r} to take a policy from (and no file {text!r})"
            ) from error
        raise ValueError(f"importing {home} raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise ValueError(f"importing {home} raised {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ImportError(f"module {home!r} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{text} is {type(found).__name__}, and {what}")
    return found


def default_target(policy: Policy) -> Target:
    """The value or logit of the action that was taken, whichever the policy writes.

    Raises:
        ValueError: it writes neither.
    """
    for key in ("action_value", "logits"):
        if key in policy.actor.out_keys:
            return Target(key, "action")
    raise ValueError(
        "what is to be explained? Give --target KEY[:INDEX]; the policy writes "
        f"{', '.join(write_key(unravel_key(key)) for key in policy.actor.out_keys)}"
    )


@dataclass(frozen=True)
class Stage:
    """An environment in which a policy was found able to act.

    Attributes:
        env: the environment.
        actions: names of its actions; none where they are not one of several.
    """

    env: EnvBase
    actions: tuple[str, ...]

    @staticmethod
    def of(policy: Policy, seed: int, render: bool = False) -> Stage:
        """Make the environment of a policy, one that can be rendered if asked, and let the policy act once.

        Raises:
            ValueError: there is no such environment, or the policy does not fit it.
        """
        env = make_env(policy, seed, render)
        observed = env.reset()
        _check_observation(policy, env, observed)
        _check_action(policy, env, observed)
        count = getattr(env.action_spec.space, "n", 0)
        named = len(policy.actions) == count
        return Stage(env, policy.actions if named else tuple(f"action {i}" for i in range(count)))


def _check_observation(policy: Policy, env: EnvBase, observed: TensorDictBase) -> None:
    for key in policy.actor.in_keys:
        value = observed.get(key, None)
        if value is None:
            given = ", ".join(repr(k) for k in env.observation_spec.keys(True, True))
            raise ValueError(
                f"the policy reads {key!r}, which environment {policy.env_id!r} does not give: it gives {given}"
            )
        shown = value.shape[0] if value.dim() == 3 else value.numel()  # an image has one name per channel
        if policy.features and len(policy.actor.in_keys) == 1 and shown != len(policy.features):
            raise ValueError(
                f"the policy sees {len(policy.features)} features ({', '.join(policy.features)}), and environment "
                f"{policy.env_id!r} shows {shown}"
            )


def _check_action(policy: Policy, env: EnvBase, observed: TensorDictBase) -> None:
    try:
        with torch.no_grad():
            action = policy.actor(observed).get("action", None)
    except RuntimeError as error:
        raise ValueError(
            f"the policy does not run on an observation of {policy.env_id!r}: {error}"
        ) from error
    if action is None:
        written = ", ".join(map(repr, policy.actor.out_keys))
        raise ValueError(f"the policy writes no 'action', so it cannot act; it writes {written}")
    spec = env.action_spec
    if action.shape != spec.shape or not spec.is_in(action):
        raise ValueError(
            f"the policy's action {action.tolist()} is none of environment {policy.env_id!r}, whose actions are "
            f"{type(spec).__name__} of shape {list(spec.shape)}"
        )
