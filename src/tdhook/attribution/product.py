"""The product of two methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.attribution.around import explained_first, require_values_alone
from tdhook.contexts.attribution import Attribution
from tdhook.models.model import Model
from tdhook.passes.runner import Runner
from tdhook.targets import TargetLike

__all__ = ["Product"]


class Product(Attribution):
    """The relevance by one method times that by another.

    Guided Grad-CAM is ``Product(GradCAM("layer"), GuidedBackprop())`` (Selvaraju et al. 2017, section 3.2).

    Args:
        first: says what is explained and attributed.
        second: asked the same.

    Raises:
        TypeError: one of them compares with a reference.
        ValueError: one of them writes more than relevance, or the second is of a module that the first leaves out.
    """

    def __init__(self, first: Attribution, second: Attribution) -> None:
        super().__init__(**first.shared)
        for method in (first, second):
            require_values_alone(method, "a product is of", "a product has")
        lost = [path for path in second.input_modules or () if path not in (first.input_modules or ())]
        if lost:
            raise ValueError(
                f"the first method says what gets relevance, and {first!r} leaves out {lost[0]!r}, of which "
                f"{second!r} is: put that one first"
            )
        self.methods = (first, second.asked(**first.shared))

    def __repr__(self) -> str:
        return f"Product({self.methods[0]!r}, {self.methods[1]!r})"

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """What each method does, and the product of what both have found."""
        first, second = self.methods
        one, there = explained_first(first, runner, td, runner.state[0])
        if there.td is not td:  # which has the units that the first has told
            second = second.explaining(there.setup.question.target)
        other = second.explain(there.on(there.td, state=runner.state[1]), there.td)
        return {key: one[key] * other[key] for key in one if key in other}

    def start(self, model: Model) -> Any:
        """What each of them works out."""
        return [method.start(model) for method in self.methods]

    def asked(self, **shared: Any) -> Product:
        """The same, with other options of those that all methods take."""
        first, second = self.methods
        return Product(first.asked(**shared), second)

    def explaining(self, target: TargetLike) -> Product:
        """The same for another target."""
        return self.asked(target=target)

    @property
    def changes_inputs(self) -> bool:
        """Whether one of them does."""
        return any(method.changes_inputs for method in self.methods)

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What they read."""
        return [key for method in self.methods for key in method.reads(td)]

    def reads_signs(self, state: Any) -> bool:
        """Whether one of them does."""
        return any(method.reads_signs(there) for method, there in zip(self.methods, state, strict=True))

    def looks_across(self, state: Any) -> bool:
        """Whether one of them does."""
        return any(method.looks_across(there) for method, there in zip(self.methods, state, strict=True))

    def learnt(self, state: Any) -> str:
        """What they have seen."""
        return " ".join(method.learnt(there) for method, there in zip(self.methods, state, strict=True))
