"""The explained module: does what a model does, and writes what explains it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import named_tensors, parts_of, under
from tdhook.markup import html_table
from tdhook.models.holding import Makeup
from tdhook.models.model import Model
from tdhook.passes import compiled
from tdhook.passes.forward import Run
from tdhook.passes.graphs import Graphs
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Question, Setup
from tdhook.tape.internals import buffers_of, children_of, parameters_of, top_mode, transformed, unwatched

__all__ = ["ExplainedModule", "Explaining"]


class Explaining(Protocol):
    """What an explained module asks of the method that explains it."""

    attribution_key: NestedKey
    value_key: NestedKey
    compile: dict[str, object] | None

    @property
    def question(self) -> Question:
        """What is asked of a model."""

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """Keys that are written besides outputs, relevance and values."""

    def start(self, model: Model) -> Any:
        """What has to be worked out once per model."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """What explains one call, by source."""

    def reads_signs(self, state: Any) -> bool:
        """Whether it spares work to know that no input is negative."""

    def report(self, state: Any) -> Any:
        """The accounts of the last call, as a table."""


class ExplainedModule(TensorDictModuleBase):
    """Does what a model does and writes what each input contributed.

    Parameters, buffers and submodules are the model's own, under the same names: ``state_dict``, optimisers, weight
    synchronisation, ``to`` and ``train`` see the model.
    """

    def __init__(self, method: Explaining, model: Model, state: object = None) -> None:
        super().__init__()
        # The very dictionaries of the model, so that whatever is registered there later is seen here too.
        root = model.root
        self.__dict__.update(
            _parameters=parameters_of(root),
            _buffers=buffers_of(root),
            _modules=children_of(root),
            _non_persistent_buffers_set=root._non_persistent_buffers_set,
        )
        self.training = model.root.training
        self._method = method
        self._closed = False
        self._begin(model, state)

    def _begin(self, model: Model, state: object = None) -> None:
        """Work out what is kept from call to call, for the modules that the model now consists of."""
        method = self._method
        self.__dict__["_model"], self.__dict__["_makeup"] = model, Makeup(model.root)
        self._setup = setup = Setup(model, method.question)
        self.in_keys = list(setup.in_keys)
        self._entries: dict[NestedKey, NestedKey] = {key: self.entry(key) for key in setup.sources}
        target = setup.question.target
        self.out_keys = [*model.runner.out_keys, *self._entries.values(), *target.writes, *method.writes]
        # Some models say which of the entries that they read are attributed, and read others.
        entries = None if getattr(model.runner, "reads_everything", False) else target.entries
        self._chosen_by = None if entries is None else [key for key in entries if key not in self.in_keys]
        self.__dict__["_state"] = method.start(model) if state is None else state
        self._graphs = self._new_graphs()

    def _new_graphs(self) -> Graphs:
        return Graphs(
            self._model.root,
            self.explain,
            self.reads,
            lambda: self._method.reads_signs(self._state),
            self._method.compile,
        )

    def close(self) -> None:
        """End the module's life: a later call is an error."""
        self._closed = True
        self._graphs.clear()

    def train(self, mode: bool = True) -> ExplainedModule:
        """Set the mode of the model, too."""
        super().train(mode)
        self._model.root.training = mode
        return self

    def __getstate__(self) -> dict[str, object]:
        # Graphs are made again.
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._graphs = self._new_graphs()

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorDictModuleBase:
        model = self.model
        if model.root is model.runner and any(parameter.is_meta for parameter in self.parameters()):
            # A loss copies a network without its values, to run it with parameters that the loss keeps.
            network: TensorDictModuleBase = copy.deepcopy(model.runner, memo)
            return network
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_model" not in self.__dict__:
                raise
            return getattr(self.__dict__["_model"].runner, name)

    @property
    def method(self) -> Explaining:
        """How the model is explained."""
        return self._method

    @property
    def model(self) -> Model:
        """What is explained."""
        model: Model = self.__dict__["_model"]
        return model

    @property
    def attributed(self) -> tuple[NestedKey, ...]:
        """The keys that get relevance, as far as they are known before the model runs."""
        return self._setup.attributed

    @property
    def ledger(self) -> Any:
        """Accounts of the last call, if they were asked for."""
        return getattr(self.__dict__["_state"], "ledger", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a TensorDict and write its outputs and the relevance of its inputs into it.

        A model that consists of other modules than in the call before is explained as it now is.

        Args:
            *args: the TensorDict, which holds the keys that the model reads, with any batch size; or, as with any
                TensorDictModule, the tensors themselves in the order of ``in_keys``.
            **kwargs: the tensors by name.

        Inside ``torch.vmap`` and the other transforms of functions, as in torchrl's value estimators, the model runs as
        it is and nothing is explained.

        Returns:
            The same TensorDict, with the model's outputs and relevance under ``(attribution_key, key)``, all detached;
            or the values of ``out_keys``, if tensors were given.

        Raises:
            RuntimeError: the ``with`` block that the module lived in has ended.
            KeyError: a key is missing.
            ValueError: the batch is empty, a value that is explained is not finite, the target depends on no input.
        """
        if self._closed:
            raise RuntimeError(
                "this explained module ended with its `with` block; use `.wrap(module)` for one that lasts"
            )
        td = args[0] if args else kwargs.get("tensordict")
        if transformed():
            # Losses and value estimators look at many networks at once, and want no more than what they compute.
            return self._model.runner(*args, **kwargs)
        if not isinstance(td, TensorDictBase):
            td = self.forward(named_tensors(self.in_keys, args, kwargs))
            values = tuple(td.get(key) for key in self.out_keys)
            return values[0] if len(values) == 1 else values
        if torch.compiler.is_compiling():
            written = compiled.inline(self._graphs, td)
        else:
            if not self._makeup.holds():
                self._begin(self._model.anew())
            written = compiled.run(self._graphs, td) if self._graphs.wanted else self.explain(td)
        for key, value in written.items():
            td.set(key, value)
        return td

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """The entries of ``td`` that a call depends on."""
        if self._chosen_by is None:
            return list(td.keys(True, True))
        return [*self.in_keys, *(key for key in self._chosen_by if key in td)]

    def explain(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        """What a call writes into ``td``, operation by operation."""
        runner = Runner(self._setup, td, self._state)
        alone = nullcontext() if top_mode() is None else unwatched()
        with torch.inference_mode(False), torch.enable_grad(), alone:
            found, base = runner.carefully(lambda: self._explained(runner))
            written = base.written()
            written.update(runner.beside)
            if self._setup.question.values is not False:
                written.update(self._values(base))
            written.update(self._relevance(base, found))
        self._note_keys(written)
        return written

    def _explained(self, runner: Runner) -> tuple[Mapping[NestedKey, Tensor], Run]:
        found = self._method.explain(runner, runner.td)
        if runner.base is None:  # a method that does not run the model on the inputs as they are
            with runner.forward(runner.td):
                pass
        assert runner.base is not None
        return found, runner.base

    def _relevance(self, base: Run, found: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        sources = base.sources()
        written: dict[NestedKey, Tensor] = {}
        for key, value in found.items():
            if key not in sources:
                raise KeyError(
                    f"{type(self._method).__name__}.explain gave relevance of {key!r}, which is none of the attributed "
                    f"values: {', '.join(map(repr, sources))}"
                )
            written[self._entries.get(key) or self.entry(key)] = base.in_batch_shape(key, value, sources[key])
        return written

    def _note_keys(self, written: Mapping[NestedKey, Tensor]) -> None:
        """Keep ``out_keys`` true: integers have no relevance, modules may be called several times."""
        setup = self._setup
        if setup.leaves.integers:
            integers = [self.entry(key) for key in setup.leaves.integers]
            self.out_keys = [key for key in self.out_keys if key not in integers]
        if setup.input_modules:
            ours = parts_of(self._method.attribution_key)
            new = [key for key in written if parts_of(key)[: len(ours)] == ours and key not in self.out_keys]
            self.out_keys += new

    def _values(self, base: Run) -> dict[NestedKey, Tensor]:
        """Values beside relevance, if they are wanted."""
        values = base.values()
        return {under(self._method.value_key, key): v for key, v in values.items()}

    def entry(self, key: NestedKey) -> tuple[str, ...]:
        """Where the relevance of a key is written."""
        return (*parts_of(self._method.attribution_key), *parts_of(key))

    def _repr_html_(self) -> str:
        kind = type(self._model.root).__name__
        rows = (
            ("reads", ", ".join(map(repr, self.in_keys))),
            ("writes", ", ".join(map(repr, self.out_keys))),
        )
        table = html_table(f"{kind}, explained by {self._method!r}", ("", "keys"), rows)
        shown = getattr(self._state, "_repr_html_", None)
        return table if shown is None else table + str(shown())

    def report(self) -> Any:
        """The ledger of the last call as a table for ``rich.print``: one row per module or operation.

        Raises:
            RuntimeError: no ledger was kept.
        """
        return self._method.report(self._state)
