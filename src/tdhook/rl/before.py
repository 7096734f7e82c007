"""The step before, told by the environment to a policy that is explained while it acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from tdhook.extras import require
from tdhook.keys import known_keys, parts_of
from tdhook.perturbing.before import PREVIOUS

__all__ = ["StepBefore"]

Transform: Any = require("torchrl.envs", "tdhook.rl").Transform


class StepBefore(Transform):
    """Writes what was observed a step before beside what is observed: ``("previous", "observation")``.

    ``LRP(..., baseline="previous")`` takes it from there. So a policy that is explained while it acts, one step at a
    time, is compared with the step before; and so is the first step of what a collector brings, whose step before is in
    the batch before that. At the start of an episode, what was a step before is what is.

    Args:
        keys: what is remembered, as the policy reads it: put this behind the transforms that make it.

    Raises:
        KeyError: the environment has no such entry.
    """

    def __init__(self, keys: Sequence[NestedKey] = ("observation",)) -> None:
        keys = [unravel_key(key) for key in keys]
        super().__init__(in_keys=keys, out_keys=[(PREVIOUS, *parts_of(key)) for key in keys])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Nothing is added to a batch from a buffer, where the step before was recorded."""
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._told(next_tensordict, tensordict)

    def _reset(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._told(tensordict_reset, tensordict_reset)

    def _told(self, td: TensorDictBase, before: TensorDictBase) -> TensorDictBase:
        for key, name in zip(self.in_keys, self.out_keys, strict=True):
            value = before.get(key, None)
            if value is None:
                raise KeyError(f"the environment has no {key!r} to remember; it has {known_keys(before)}")
            td.set(name, value.clone())
        return td

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        """The same entries once more."""
        for key, name in zip(self.in_keys, self.out_keys, strict=True):
            if key not in observation_spec.keys(True):
                raise KeyError(
                    f"the environment has no {key!r} to remember; it has "
                    f"{known_keys(observation_spec.keys(True, True))}"
                )
            observation_spec[name] = observation_spec[key].clone()
        return observation_spec
