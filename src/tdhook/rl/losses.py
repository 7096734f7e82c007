"""What a learner minimises, as a model to explain: terms of torchrl's losses, and the TD error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook.keys import next_key
from tdhook.models.reads import readable_by
from tdhook.tape.internals import children_of

__all__ = ["LossTerm", "TDError"]


class LossTerm(TensorDictModuleBase):
    """A term of a loss, one value per element of the batch, as something to explain.

    ``LRP(composite, target="loss_objective").wrap(LossTerm(loss, "loss_objective"))`` reads what the loss reads and
    writes the term, and the relevance of what the networks of the loss read: the observations, and, unless the loss is
    given an advantage, those of the next step, which have none where the loss takes them off the graph. What else it
    reads (action, reward, advantage) is held constant. The loss runs as it is, with its functional parameters and its
    target networks; what it writes into its input (priorities, say) stays inside.

    Args:
        loss: a torchrl ``LossModule`` with ``reduction="none"``.
        key: the term, or a list of them.
        attributed: the keys that get relevance, instead of those that the networks of the loss read.

    Raises:
        KeyError: the loss writes no such term.
        ValueError: the loss reduces over the batch.
    """

    reads_everything = True

    def __init__(
        self,
        loss: TensorDictModuleBase,
        key: NestedKey | list[NestedKey],
        attributed: Iterable[NestedKey] | None = None,
    ) -> None:
        super().__init__()
        reduction = getattr(loss, "reduction", "none")
        if reduction not in (None, "none"):
            raise ValueError(
                f"{type(loss).__name__} has reduction={reduction!r}; to explain its terms for each element of a batch, "
                "make one with reduction='none', of the same networks"
            )
        self.loss = loss
        self.in_keys = _read_by_networks(loss) if attributed is None else list(map(unravel_key, attributed))
        self.out_keys = list(map(unravel_key, key)) if isinstance(key, list) else [unravel_key(key)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the terms, of shape ``[*batch]`` or ``[*batch, ...]``."""
        inputs = [tensordict.get(key) for key in self.in_keys]
        with _Attached(inputs):
            terms = self.loss(tensordict.copy())
        for key in self.out_keys:
            value = terms.get(key, None)
            if value is None:
                known = ", ".join(sorted(map(str, terms.keys(True, True))))
                raise KeyError(f"{type(self.loss).__name__} writes no term {key!r}; it writes {known}")
            tensordict.set(key, _per_element(value, tensordict.batch_size, key, self.loss))
        return tensordict


class _Attached(TorchFunctionMode):
    """Keeps inputs on the graph, which a loss takes off it since to it they are data."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._inputs = {id(x): x for x in inputs}

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is Tensor.detach and id(args[0]) in self._inputs:
            return args[0]
        return func(*args, **(kwargs or {}))


def _per_element(value: Tensor, batch: torch.Size, key: NestedKey, loss: nn.Module) -> Tensor:
    """A term in the batch's shape; losses may flatten it."""
    if value.shape[: len(batch)] == batch:
        return value
    if len(batch) > 1 and value.shape[:1] == (batch.numel(),):
        return torch.unflatten(value, 0, batch)
    raise ValueError(
        f"the term {key!r} of {type(loss).__name__} has the shape {tuple(value.shape)} for a batch of {list(batch)}: "
        "it is not given for each element of the batch, so that it cannot be explained for each"
    )


def _read_by_networks(loss: nn.Module) -> list[NestedKey]:
    """The inputs of the loss that its networks read, now or in the next step."""
    held = {**vars(loss), **children_of(loss)}
    networks = [
        network
        for name, network in held.items()
        if isinstance(network, TensorDictModuleBase)
        and (name.endswith("_network") or f"{name}_params" in held)
    ]
    written = {unravel_key(key) for module in networks for key in module.out_keys}
    read = dict.fromkeys(unravel_key(key) for module in networks for key in module.in_keys)
    now = [key for key in read if key not in written]
    if hasattr(getattr(loss, "tensor_keys", None), "advantage"):
        return now
    return [*now, *map(next_key, now)]


class TDError(TensorDictModuleBase):
    """The temporal-difference error ``r + gamma V(s') (1 - terminated) - V(s)`` as something to explain.

    ``LRP(composite, target="td_error").wrap(TDError(critic, gamma=0.99))`` gives relevance to what the critic saw now
    and in the next step, and to the reward, whose relevance is the reward: the three sum to the error, less what biases
    and constants take.

    Args:
        value_network: writes ``value_key``, ``[*batch, 1]``, and is run on the step and on the next one.
        gamma: the discount.
        target_network: the critic of the next step, if it is another.
        value_key: what the critics write.
        reward_key: the reward, ``[*batch, 1]``.
        terminated_key: whether the episode ended with the step, ``[*batch, 1]``.
        key: where the error is written, ``[*batch, 1]``.

    Raises:
        ValueError: a critic does not write ``value_key``.
    """

    reads_everything = True

    def __init__(
        self,
        value_network: TensorDictModuleBase,
        gamma: float,
        target_network: TensorDictModuleBase | None = None,
        *,
        value_key: NestedKey = "state_value",
        reward_key: NestedKey = ("next", "reward"),
        terminated_key: NestedKey = ("next", "terminated"),
        key: NestedKey = "td_error",
    ) -> None:
        super().__init__()
        self.value_network = value_network
        self.target_network = value_network if target_network is None else target_network
        self.gamma = gamma
        self.value_key = unravel_key(value_key)
        self.reward_key, self.terminated_key = unravel_key(reward_key), unravel_key(terminated_key)
        for network in (self.value_network, self.target_network):
            if self.value_key not in map(unravel_key, network.out_keys):
                raise ValueError(
                    f"the critic writes {network.out_keys} and not {self.value_key!r}: give value_key="
                )
        now = list(map(unravel_key, self.value_network.in_keys))
        ahead = [next_key(unravel_key(key)) for key in self.target_network.in_keys]
        self.in_keys = [*now, *ahead, self.reward_key]
        self.out_keys = [unravel_key(key)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the error."""
        terminated = tensordict.get(self.terminated_key, None)
        if terminated is None:
            raise KeyError(
                f"the TD error needs to know whether the episode ended: there is no entry {self.terminated_key!r}; "
                "give terminated_key="
            )
        now = self.value_network(readable_by(self.value_network, tensordict)).get(self.value_key)
        ahead = readable_by(self.target_network, tensordict.get("next"))
        then = self.target_network(ahead).get(self.value_key)
        goes_on = self.gamma * (1.0 - terminated.to(then.dtype))
        error = tensordict.get(self.reward_key) + goes_on * then - now
        return tensordict.set(self.out_keys[0], error)
