"""What other libraries take for a model and for an explanation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution
from tdhook.evaluation.runs import relevance_of
from tdhook.targets import Target

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Classifier", "as_classifier", "quantus_explain_func"]


class Classifier(nn.Module):
    """A TensorDict model as a function of one tensor, with the model's own parameters.

    Args:
        module: the model.
        in_key: what it is a function of.
        out_key: the output that it returns.
        others: values of the other keys that the model reads, each of one element of the batch.
    """

    def __init__(
        self,
        module: TensorDictModuleBase,
        in_key: NestedKey,
        out_key: NestedKey,
        others: TensorDictBase | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.in_key, self.out_key = unravel_key(in_key), unravel_key(out_key)
        self.others = others
        self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """The output for a batch of inputs, ``[n, *features] -> [n, outputs]``."""
        td = TensorDict(batch_size=input.shape[:1], device=input.device)
        if self.others is not None:
            td.update(self.others.expand(*input.shape[:1], *self.others.batch_size))
        td.set(self.in_key, input)
        with set_interaction_type(InteractionType.DETERMINISTIC):
            output: Tensor = self.module(td).get(self.out_key)
        return output


def as_classifier(
    module: TensorDictModuleBase,
    in_key: NestedKey | None = None,
    out_key: NestedKey | None = None,
    others: TensorDictBase | None = None,
) -> Classifier:
    """A plain ``nn.Module`` of a TensorDict model, for libraries that know no TensorDicts.

    Args:
        module: the model.
        in_key: what it is a function of; by default the only key that it reads.
        out_key: the output that is returned, logits or action values say; by default the only key that it writes.
        others: values of other keys that it reads, of one element of the batch; the same for every input.

    Raises:
        ValueError: the model reads or writes several keys, and none was named; or there is no such key.
    """
    return Classifier(
        module,
        _named(module.in_keys, in_key, "in_key", "reads"),
        _named(module.out_keys, out_key, "out_key", "writes"),
        others,
    )


def _named(known: Any, given: NestedKey | None, name: str, does: str) -> NestedKey:
    keys: list[NestedKey] = [unravel_key(key) for key in known]
    listed = ", ".join(map(repr, keys))
    if given is None:
        if len(keys) != 1:
            raise ValueError(f"the model {does} {listed}: say which with {name}=")
        return keys[0]
    if unravel_key(given) not in keys:
        raise ValueError(f"{name}={given!r} is none of the keys that the model {does}: {listed}")
    return given


def quantus_explain_func(method: Attribution) -> Callable[..., np.ndarray[Any, Any]]:
    """An ``explain_func`` for the metrics of quantus (Hedström et al. 2023).

    Give quantus the model as :func:`as_classifier` makes it, and this function:
    ``metric(model=as_classifier(actor, out_key="logits"), x_batch=x, y_batch=actions,
    explain_func=quantus_explain_func(LRP("epsilon_plus")))``. Models that quantus changes on its way are explained as
    they are then.

    Args:
        method: how to explain; what is explained is the output that quantus names.

    Returns:
        ``(model, inputs [n, *features], targets [n], **ignored) -> relevance [n, *features]``, of NumPy arrays.
    """

    def explain(model: nn.Module, inputs: object, targets: object, **ignored: object) -> np.ndarray[Any, Any]:
        weights = next(iter(model.parameters()), torch.zeros(()))
        x = torch.as_tensor(inputs).to(device=weights.device, dtype=weights.dtype)
        chosen = torch.as_tensor(targets, device=weights.device).to(torch.int64).reshape(len(x))
        td = TensorDict({"input": x}, batch_size=[len(x)])
        explaining: Any = method
        with explaining.explaining(Target("output", chosen)).prepare(model) as explained:
            relevance = relevance_of(explained(td), method.attribution_key)["input"]
        return relevance.cpu().numpy()

    return explain
