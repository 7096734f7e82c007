"""What is measured of a model whose input was changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook.passes.questions import Asked
from tdhook.targets import Probability, Target

__all__ = ["Measure", "Measured"]

Measure: TypeAlias = "str | Callable[[TensorDictBase], Tensor]"
"""``"target"``, ``"probability"``, ``"agreement"``, or a function ``outputs -> [rows]``."""


class Measured:
    """A measure of one question, asked about some rows.

    Args:
        measure: what is measured.
        question: what the model was asked.
        rows: the inputs as they are, ``[rows, *rest]``.

    Raises:
        ValueError: there is no such measure, or it does not fit the target.
    """

    def __init__(self, measure: Measure, question: Asked, rows: TensorDictBase) -> None:
        self._question = question
        self._kept: Tensor | None = None
        if callable(measure):
            self._measure: Callable[[TensorDictBase, TensorDictBase], Tensor] = lambda outputs, _: measure(
                outputs
            )
        elif measure == "target":
            self._measure = question.values
        elif measure == "probability":
            self._measure = self._probability
        elif measure == "agreement":
            self._kept = self._answer(question.outputs(rows))
            self._measure = self._agreement
        else:
            raise ValueError(
                f"measure={measure!r} is none of 'target', 'probability', 'agreement', and no function of the outputs"
            )

    def __call__(self, outputs: TensorDictBase, rows: TensorDictBase, copies: int) -> Tensor:
        """The measure of ``copies`` changed copies of the rows, one after the other: ``[copies, rows]``."""
        values = self._measure(outputs, rows)
        if values.shape[:1] != rows.batch_size[:1]:
            raise ValueError(
                f"a measure gives one value per row, here {len(rows)}, and not shape {list(values.shape)}"
            )
        return values.to(torch.float64).reshape(copies, len(rows) // copies, -1).mean(-1)

    def _probability(self, outputs: TensorDictBase, rows: TensorDictBase) -> Tensor:
        target = self._question.given
        if isinstance(target, Probability):
            return self._question.values(outputs, rows)
        if not isinstance(target, Target) or target.index is None:
            raise ValueError(
                f"measure='probability' is that of one output among several, and {target!r} names none; give an "
                "index, as in Target('logits', 'action'), or measure='target'"
            )
        seeds = self._question.seeds(outputs, rows)
        return (seeds.tensors[0].softmax(-1) * seeds.grads[0]).sum(-1)

    def _answer(self, outputs: TensorDictBase) -> Tensor:
        """The action, or where the model writes none the largest of the outputs that are explained."""
        action = outputs.get("action", None)
        if action is None:
            target = self._question.given
            key = target.key if isinstance(target, Target) else None
            z = None if key is None else outputs.get(key, None)
            if z is None or z.shape[-1] < 2:
                raise ValueError(
                    f"measure='agreement' compares actions; the model writes none, and {target!r} is not one of "
                    "several outputs: use measure='target'"
                )
            action = z.argmax(-1, keepdim=True)
        if action.is_floating_point() and not bool(((action == 0) | (action == 1)).all()):
            raise ValueError(
                "measure='agreement' compares discrete actions, and these are continuous: use measure='target', or a "
                "function of the outputs"
            )
        answer: Tensor = action.unsqueeze(-1) if action.dim() == outputs.batch_dims else action
        return answer

    def _agreement(self, outputs: TensorDictBase, rows: TensorDictBase) -> Tensor:
        assert self._kept is not None
        answer = self._answer(outputs)
        same: Tensor = answer.unflatten(0, (-1, len(self._kept))) == self._kept
        return same.all(-1).flatten(0, 1)
