"""From a model to a TensorDictModule that also explains it: what all attribution methods share.

A method says in one function, :meth:`Attribution.explain`, what explains a model. What is asked, which values are
attributed, where relevance is written, several targets, any batch shape, compilation and the life of the explained
module are the same for all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.explained import ExplainedModule
from tdhook.models.model import InKeys, Model
from tdhook.passes.graphs import Compile, compile_options
from tdhook.passes.leaves import Choose
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Attribute, Question
from tdhook.targets import TargetLike, as_seeder
from tdhook.targets.base import Seeder

__all__ = ["Attribution", "Prepared", "Shared"]

Self = TypeVar("Self", bound="Attribution")


class Shared(TypedDict, total=False):
    """Keywords of :class:`Attribution` that methods with keywords of their own hand on."""

    attribute: Sequence[NestedKey] | str | Choose | None
    attribution_key: NestedKey
    use_inputs: bool
    input_modules: Sequence[str] | None
    target_modules: Sequence[str] | None
    values: bool | Sequence[NestedKey]
    compile: Compile
    memory_budget: int | None


class Prepared:
    """A model made ready for ``with`` blocks, each of which gives an explained module that lasts as long as it does."""

    def __init__(self, method: Attribution, model: Model) -> None:
        self._method, self._model = method, model
        self._open: list[ExplainedModule] = []

    def __enter__(self) -> ExplainedModule:
        self._open.append(ExplainedModule(self._method, self._model))
        return self._open[-1]

    def __exit__(self, *exception: object) -> None:
        self._open.pop().close()


class Attribution(ABC):
    """A configured attribution method.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        attribute: keys to give relevance for: keys that the model reads, keys that a ``TensorDictModule`` inside it
            writes, or ``"all"`` of these; by default those it reads. Or a function ``(inputs, td) -> inputs`` that
            chooses among the inputs, or puts others in their place.
        attribution_key: where relevance is written: that of ``key`` under ``(attribution_key, key)``.
        use_inputs: whether inputs get relevance.
        input_modules: paths of modules whose outputs get relevance, under ``(attribution_key, path)``; that of a second
            call of the same module is under ``"path:1"``, of a third under ``"path:2"``, and so on. ``"path:input"`` is
            what the module was given (the first floating-point tensor), as far as it goes through that module. A key
            that is no path is one of ``attribute``.
        target_modules: paths of modules whose outputs may be explained, as if they were keys: ``Target(("path",))``.
        values: whether the values of what is attributed are written too, under ``("value", key or path)``; or the keys
            and paths whose values are.
        compile: whether to run as one graph, by ``torch.compile``: ``True``, or its mode, or a dictionary of its
            options. The first call compiles, which takes seconds; where that cannot be done a warning says why, once.
        memory_budget: bytes that the gradients of several targets (``index="all"``) may take together, counted as four
            times the largest of them; as many targets as fit share one backward pass. By default 32 MiB on a CPU (more
            does not fit its caches, and takes longer) and 1 GiB elsewhere; 0 for one target at a time.
    """

    value_key: NestedKey = "value"
    sides: tuple[str, ...] = ()
    """Names under which lies what the model reads, of each of several runs; none where it lies at its own keys."""

    def __init__(
        self,
        target: TargetLike = None,
        *,
        attribute: Sequence[NestedKey] | str | Choose | None = None,
        attribution_key: NestedKey = "attr",
        use_inputs: bool = True,
        input_modules: Sequence[str] | None = None,
        target_modules: Sequence[str] | None = None,
        values: bool | Sequence[NestedKey] = False,
        compile: Compile = False,
        memory_budget: int | None = None,
    ) -> None:
        self.target: TargetLike = target
        self.seeder: Seeder = as_seeder(target)
        self.attribute = _attribute(attribute)
        self.attribution_key: NestedKey = unravel_key(attribution_key)
        self.use_inputs = use_inputs
        self.input_modules = _paths("input_modules", input_modules)
        self.target_modules = _paths("target_modules", target_modules)
        self.values = values if isinstance(values, bool) else tuple(map(unravel_key, values))
        self.compile = compile_options(compile)
        self.memory_budget = memory_budget

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target={self.target!r})"

    def start(self, model: Model) -> Any:
        """What the method has to work out once per model, which :attr:`Runner.state` then is."""
        return None

    @abstractmethod
    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """What explains the model on ``td``.

        Args:
            runner: runs the model, forwards and backwards.
            td: what the explained module was called with, of any batch size.

        Returns:
            Relevance by the keys of :meth:`~tdhook.passes.forward.Run.sources`: each of the shape of the source, or
            ``[outputs, *shape]`` where several outputs are explained. It is written as ``[*batch, *features]``, or
            ``[*batch, outputs, *features]``.
        """

    def coefficients(
        self, runner: Runner, td: TensorDictBase, there: Mapping[NestedKey, Tensor]
    ) -> Mapping[NestedKey, Tensor]:
        """What a change of each source by one counts, as the method linearises the model.

        Args:
            runner: runs the model.
            td: the batch where it is linearised.
            there: values of the sources elsewhere, for a method that goes there or compares with them.

        Returns:
            By source, of its shape, or ``[outputs, *shape]``.

        Raises:
            TypeError: it does not linearise the model.
        """
        raise TypeError(
            f"{type(self).__name__} gives no coefficients of activations; Gradient, IntegratedGradients and LRP do"
        )

    def runs_on(self, td: TensorDictBase) -> list[TensorDictBase]:
        """The batches that the model is run on, of which each has what the model reads at its own keys."""
        return [td]

    @property
    def shared(self) -> dict[str, Any]:
        """What all methods take, as this one was given it."""
        return {
            "target": self.target,
            "attribute": self.attribute,
            "attribution_key": self.attribution_key,
            "use_inputs": self.use_inputs,
            "input_modules": self.input_modules,
            "target_modules": self.target_modules,
            "values": self.values,
            "compile": False if self.compile is None else self.compile,
            "memory_budget": self.memory_budget,
        }

    def asked(self: Self, **shared: Any) -> Self:
        """The same, with other options of those that all methods take."""
        made = copy.copy(self)
        Attribution.__init__(made, **{**self.shared, **shared})
        return made

    def explaining(self: Self, target: TargetLike) -> Self:
        """The same for another target."""
        other = copy.copy(self)
        other.target, other.seeder = target, as_seeder(target)
        return other

    @property
    def question(self) -> Question:
        """What is asked of any model."""
        return Question(
            self.seeder,
            self.attribute,
            self.use_inputs,
            self.input_modules,
            self.target_modules,
            self.values,
            self.memory_budget,
            self.changes_inputs,
        )

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """Keys that are written besides outputs, relevance and values."""
        return ()

    @property
    def writes_under(self) -> tuple[str, ...]:
        """Names under which more is written of what is attributed or explained."""
        return ()

    @property
    def changes_inputs(self) -> bool:
        """Whether a method changes inputs, those too that are not attributed."""
        return False

    @property
    def is_gradient(self) -> bool:
        """Whether relevance is the gradient itself, so that a mean of it may be taken on the way back."""
        return False

    @property
    def compares(self) -> bool:
        """Whether the difference from a reference is explained, and not the value."""
        return False

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """Entries of ``td`` that are read besides those that the model and the target read."""
        return []

    def among(self: Self, td: TensorDictBase) -> Self:
        """The same, where what is explained is compared with others: with those of ``td``."""
        return self

    def drawn_from(self: Self, rows: Callable[[], TensorDictBase]) -> Self:
        """The same, where what is explained is compared with others: with these rows, which are asked for if wanted."""
        return self

    @property
    def steps_before(self) -> int:
        """How many steps before a step are looked at."""
        return 0

    def settled(
        self: Self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[Self, TensorDictBase, Callable[[TensorDictBase], TensorDictBase]]:
        """The same for parts of a batch, where what is explained of one depends on more than that part.

        Args:
            keys: the inputs that are attributed.
            td: the whole batch.
            valid: ``[*batch]``, truth values, which of its elements are no padding; all by default.
            each: whether each element is to have what it is compared with in entries of its own, but for numbers.
            first: how many elements there are before those of ``td``, where that is a part itself: the draws of an
                element are those of its number among all.

        Returns:
            The method for parts; the batch to take them of, with what they need; and what makes a part ready.
        """
        return self, td, lambda part: part

    def reads_signs(self, state: Any) -> bool:
        """Whether it spares work to know that no input is negative."""
        return False

    def looks_across(self, state: Any) -> bool:
        """Whether what it says of an element may depend on the others, though the model's answer does not."""
        return False

    def learnt(self, state: Any) -> str:
        """What was seen in earlier calls that later ones depend on, in words."""
        return ""

    def report(self, state: Any) -> Any:
        """The accounts of the last call, as a table.

        Raises:
            RuntimeError: none were kept.
        """
        raise RuntimeError(f"{type(self).__name__} keeps no accounts to report; LRP(..., ledger=True) does")

    def prepare(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Prepared:
        """Explain ``module`` within a ``with`` block.

        Args:
            module: a TensorDictModule, or any module, which then reads ``"input"`` and writes ``"output"``.
            in_keys: keys that a plain module reads, in the order of its arguments or as ``{argument: key}``; of a
                TensorDictModule, those that are attributed.
            out_keys: keys that a plain module writes.

        Returns:
            A context manager, for one ``with`` block or several after each other, that gives a TensorDictModule which
            does what ``module`` does and writes relevance too.
        """
        return Prepared(self, Model.of(module, in_keys, out_keys))

    def wrap(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> ExplainedModule:
        """Like :meth:`prepare`, to stay: goes wherever ``module`` went, and has its parameters under the same names."""
        return ExplainedModule(self, Model.of(module, in_keys, out_keys))


def _paths(name: str, given: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ValueError(f"{name}={given!r} is no list of paths; write [{given!r}]")
    return tuple(given or ())


def _attribute(attribute: Sequence[NestedKey] | str | Choose | None) -> Attribute:
    if isinstance(attribute, str) and attribute != "all":
        raise ValueError(
            f"attribute={attribute!r} is neither 'all' nor a list of keys; write [{attribute!r}]"
        )
    if attribute is None or isinstance(attribute, str) or callable(attribute):
        return attribute
    return tuple(map(unravel_key, attribute))
