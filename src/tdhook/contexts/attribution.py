"""From a model to a TensorDictModule that also explains it: what all attribution methods share.

A method says what it changes while the model runs and how gradients become relevance; preparing inputs, asking for
targets, the backward pass and writing the results happen here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.models.model import InKeys, Model
from tdhook.models.state import leaves_of
from tdhook.passes.graphs import Compile, compile_options
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.targets import Seeds

if TYPE_CHECKING:
    from tdhook.contexts.explained import ExplainedModule

__all__ = ["Attribution", "Conditions", "Prepared", "Record"]


@dataclass
class Record:
    """What one forward pass left behind.

    Attributes:
        inputs: the attributed inputs, leaves of the graph.
        outputs: what the model wrote, on the graph, in the batch shape of the TensorDict.
        flat: whether the model ran on a flat batch, whose leading axis ``modules`` and ``keys`` have.
        modules: outputs of the modules that were asked for by path, on the graph.
        keys: values of the inner keys that were asked for, on the graph.
    """

    inputs: dict[NestedKey, Tensor]
    outputs: TensorDictBase
    flat: bool
    modules: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[NestedKey, Tensor] = field(default_factory=dict)

    def shaped(self, value: Tensor, *, after: bool = False) -> Tensor:
        """A value from inside the model in the batch shape of the TensorDict; ``after`` a leading axis if so."""
        if not self.flat:
            return value
        lead = value.shape[:after]
        return value.reshape(*lead, *self.outputs.batch_size, *value.shape[after + 1 :])


@dataclass(frozen=True)
class Conditions:
    """How a method wants a model to be run.

    Attributes:
        flow: the convention in which gradients travel.
        forward: entered around the forward pass.
        overwrites: whether the model overwrites tensors, so that it must not be given leaves of the graph.
        ledger: what keeps accounts of the run, if anything does.
    """

    flow: Convention
    forward: AbstractContextManager[None] = field(default_factory=nullcontext)
    overwrites: bool = False
    ledger: Ledger | None = None


class Prepared:
    """A model made ready for ``with`` blocks, each of which gives an explained module that lasts as long as it does."""

    def __init__(self, method: Attribution, model: Model) -> None:
        self._method, self._model = method, model
        self._open: list[ExplainedModule] = []

    def __enter__(self) -> ExplainedModule:
        from tdhook.contexts.explained import ExplainedModule

        self._open.append(ExplainedModule(self._method, self._model))
        return self._open[-1]

    def __exit__(self, *exception: object) -> None:
        self._open.pop().close()


class Attribution(ABC):
    """A configured attribution method.

    Args:
        attribute: keys to give relevance for: keys that the model reads, keys that a ``TensorDictModule`` inside it
            writes, or ``"all"`` of these; by default those it reads.
        attribution_key: where relevance is written: that of ``key`` under ``(attribution_key, key)``.
        use_inputs: whether inputs get relevance.
        input_modules: paths of modules whose outputs get relevance, under ``(attribution_key, path)``.
        target_modules: paths of modules whose outputs may be explained, as if they were keys.
        compile: whether to run as one graph, by ``torch.compile``; or its mode, or its options.
        memory_budget: bytes that the gradients of several targets may take together; as many targets as fit share one
            backward pass; by default 32 MiB on a CPU and 1 GiB elsewhere.
    """

    def __init__(
        self,
        *,
        attribute: Sequence[NestedKey] | str | None = None,
        attribution_key: NestedKey = "attr",
        use_inputs: bool = True,
        input_modules: Sequence[str] | None = None,
        target_modules: Sequence[str] | None = None,
        compile: Compile = False,
        memory_budget: int | None = None,
    ) -> None:
        if isinstance(attribute, str) and attribute != "all":
            raise ValueError(
                f"attribute={attribute!r} is neither 'all' nor a list of keys; write [{attribute!r}]"
            )
        self.attribute = (
            attribute if isinstance(attribute, str | None) else tuple(map(unravel_key, attribute))
        )
        self.attribution_key: NestedKey = unravel_key(attribution_key)
        self.use_inputs = use_inputs
        self.input_modules = tuple(input_modules or ())
        self.target_modules = tuple(target_modules or ())
        self.compile = compile_options(compile)
        self.memory_budget = memory_budget

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
        from tdhook.contexts.explained import ExplainedModule

        return ExplainedModule(self, Model.of(module, in_keys, out_keys))

    def extra_in_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the method reads besides those of the model."""
        return ()

    @abstractmethod
    def start(self, model: Model) -> Any:
        """What the method has to work out once per model; its state is kept by the explained module."""

    @abstractmethod
    def active(self, state: Any, model: Model, td: TensorDictBase) -> AbstractContextManager[Conditions]:
        """Change the model for one forward and backward pass."""

    @abstractmethod
    def seeds(self, record: Record, td: TensorDictBase, flow: Convention) -> Seeds:
        """Where the backward pass starts."""

    @abstractmethod
    def relevance(self, state: Any, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """The relevance of ``value``, given what the backward pass brought to it."""

    def reads_signs(self, state: Any) -> bool:
        """Whether it spares work to know that no input is negative."""
        return False

    def extra_out_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the method writes besides outputs and relevance."""
        return ()

    def target_entries(self) -> Sequence[NestedKey] | None:
        """Entries that say what is explained, besides the keys that are read anyway; ``None`` for any of them."""
        return ()

    def derive(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        """The outputs, and what is to be explained besides them; called as a part of the model."""
        return outputs

    def differentiable(
        self, work: TensorDictBase, keys: Sequence[NestedKey], td: TensorDictBase
    ) -> Iterable[tuple[NestedKey, Tensor]]:
        """Of the entries ``keys`` of ``work``, those that are attributed, with their values."""
        return [leaf for key in keys for leaf in leaves_of(key, work.get(key))]

    def extras(self, record: Record) -> dict[NestedKey, Any]:
        """Further entries to write."""
        return {}

    def attributed_keys(self, model: Model) -> tuple[NestedKey, ...]:
        """The keys that are asked for, as far as they are known before the model runs.

        Raises:
            ValueError: the model neither reads nor writes one of them.
        """
        if not isinstance(self.attribute, tuple):
            return model.attributed if self.use_inputs else ()
        inner = (m for m in model.runner.modules() if isinstance(m, TensorDictModuleBase))
        known = {unravel_key(key) for module in inner for key in module.out_keys}
        for key in self.attribute:
            if key not in known and key not in model.attributed:
                names = ", ".join(map(repr, [*model.attributed, *sorted(known, key=str)]))
                raise ValueError(
                    f"attribute names {key!r}, which the model neither reads nor writes; it has {names}"
                )
        return self.attribute
