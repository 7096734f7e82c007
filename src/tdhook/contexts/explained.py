"""The explained module: does what a model does, and writes what explains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.acting import in_an_objective, require_none_besides, takes_one_argument
from tdhook.keys import named_tensors, parts_of, put, under
from tdhook.markup import html_table, shown
from tdhook.models.entries import is_batch, require_fields
from tdhook.models.holding import Makeup
from tdhook.models.lazy import initialise, is_unmade
from tdhook.models.model import Model
from tdhook.passes import compiled
from tdhook.passes.forward import Run
from tdhook.passes.graphs import Graphs
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Question, Setup
from tdhook.tape.internals import buffers_of, children_of, parameters_of, top_mode, transformed
from tdhook.tape.modes import unwatched
from tdhook.tape.undoing import Undoing, all_of

__all__ = ["ExplainedModule", "Explaining"]


class Explaining(Protocol):
    """What an explained module asks of the method that explains it."""

    attribution_key: NestedKey
    value_key: NestedKey
    compile: dict[str, object] | None
    sides: tuple[str, ...]

    @property
    def question(self) -> Question:
        """What is asked of a model."""

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """Keys that are written besides outputs, relevance and values."""

    @property
    def writes_under(self) -> tuple[str, ...]:
        """Names under which more is written of what is attributed or explained."""

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """Entries that are read besides those that the model and the target read."""

    def runs_on(self, td: TensorDictBase) -> list[TensorDictBase]:
        """The batches that the model is run on."""

    def start(self, model: Model) -> Any:
        """What has to be worked out once per model."""

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """What explains one call, by source."""

    def reads_signs(self, state: Any) -> bool:
        """Whether it spares work to know that no input is negative."""

    def learnt(self, state: Any) -> str:
        """What was seen in earlier calls that later ones depend on, in words."""

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
        self._unmade = is_unmade(model.root)
        self._setup = setup = Setup(model, method.question)
        self.in_keys = list(setup.in_keys)
        if method.sides:
            self.in_keys = [under(side, key) for side in method.sides for key in setup.in_keys]
        self._entries = {key: self.entry(key) for key in setup.sources}
        self._told = {entry: parts_of(key) for key, entry in self._entries.items()}
        target = setup.question.target
        self.out_keys = [
            *model.runner.out_keys,
            *self._entries.values(),
            *target.writes,
            *target.tells,
            *method.writes,
        ]
        if "spread" in method.writes_under:
            self.out_keys += [("spread", *parts_of(key)) for key in setup.sources]
        # Some models say which of the entries that they read are attributed, and read others.
        entries = None if model.reads_everything else target.entries
        self._chosen_by = None if entries is None else [key for key in entries if key not in self.in_keys]
        self.__dict__["_state"] = method.start(model) if state is None else state
        self._graphs = self._new_graphs()

    def afresh(self) -> None:
        """Explain what comes as if nothing had been explained before: what is kept may decide the last digits."""
        self._begin(self.model)

    def _make_lazy_layers(self, td: TensorDictBase) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self._model.root).__name__} has lazy layers, which tdhook makes in the first call of the "
                "explained module; call it once before it is compiled"
            )
        if is_unmade(self._model.root):
            initialise(self._model, self._method.runs_on(td)[0])
        self._begin(self._model.anew())

    def _new_graphs(self) -> Graphs:
        return Graphs(
            self._model.root,
            self.explain,
            self.reads,
            lambda: self._method.reads_signs(self._state),
            lambda: f"{self._method.learnt(self._state)} {self._setup.layout}",
            self._method,
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

    def explain_by(self, method: Explaining) -> None:
        """From now on, explain by a method that asks and writes the same."""
        self._method = method

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

    @takes_one_argument
    def forward(self, *args: Any, tensordict_out: TensorDictBase | None = None, **kwargs: Any) -> Any:
        """Run the model on a TensorDict and write its outputs and the relevance of its inputs into it.

        A model that consists of other modules than in the call before is explained as it now is.

        Args:
            *args: the TensorDict, which holds the keys that the model reads, with any batch size; or, as with any
                TensorDictModule, the tensors themselves in the order of ``in_keys``. A lazy stack and a tensorclass
                are TensorDicts, too.
            tensordict_out: what is written to instead.
            **kwargs: the tensors by name.

        In torchrl's losses and value estimators the model runs as it is, for these to differentiate, and nothing is
        explained.

        Returns:
            The same TensorDict, with the model's outputs and relevance under ``(attribution_key, key)``, all detached;
            another one where the model returns another one (``inplace=False``); or the values of ``out_keys``, if
            tensors were given.

        Raises:
            RuntimeError: the ``with`` block that the module lived in has ended.
            NotImplementedError: it is called inside ``torch.vmap`` or another transform of functions.
            KeyError: a key is missing, and the model cannot do without.
            TypeError: there are arguments that no TensorDictModule takes.
            ValueError: the batch is empty, a tensorclass lacks a field that is written to, a value that is explained
                is not finite, the target depends on no input.
        """
        if self._closed:
            raise RuntimeError(
                "this explained module ended with its `with` block; use `.wrap(module)` for one that lasts"
            )
        given = args[0] if args else kwargs.get("tensordict")
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if in_an_objective():
                return self._model.runner(*args, **kwargs)
            if transformed():
                raise NotImplementedError(
                    "an explained module makes a backward pass of its own, which torch.vmap and other transforms of "
                    "functions cannot look into: call it on the whole batch, outside of them"
                )
        if not is_batch(given):
            values = self._called_with_tensors(named_tensors(self.in_keys, args, kwargs), tensordict_out)
            return values[0] if len(values) == 1 else values
        if kwargs or len(args) > 1:
            require_none_besides(args, kwargs)
        td = given
        if type(into := td if tensordict_out is None else tensordict_out) is not TensorDict:
            require_fields(into, self.out_keys)
        if not compiling and not self._makeup.holds():
            self._begin(self._model.anew())
        if self._unmade:
            self._make_lazy_layers(td)
        if compiling:
            written = compiled.inline(self._graphs, td)
        elif self._graphs.wanted:
            with Undoing():
                written = compiled.run(self._graphs, td)
        else:
            written = self.explain(td)
        apart = self._setup.apart
        if tensordict_out is None and apart is not None:
            into = apart.fresh(td)
        self._write(written, into)
        return into

    def _called_with_tensors(self, td: TensorDictBase, into: TensorDictBase | None) -> tuple[Any, ...]:
        td = self.forward(td, tensordict_out=into)
        return tuple(td.get(key) for key in self.out_keys)

    def _write(self, written: Mapping[NestedKey, Any], into: TensorDictBase) -> None:
        """Write relevance beside what it tells of: ``("attr", "agents")`` has the axes of ``"agents"``."""
        for key, value in written.items():
            if isinstance(key, str):
                into.set(key, value)
            else:
                put(into, key, value, self._told.get(key) or self._of(key))

    def _of(self, key: tuple[str, ...]) -> tuple[str, ...] | None:
        """What an entry tells of."""
        ours = (self._method.attribution_key, self._method.value_key, *self._method.writes_under)
        for name in map(parts_of, ours):
            if key[: len(name)] == name:
                return key[len(name) :] or None
        return key

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """The entries of ``td`` that a call depends on."""
        if self._chosen_by is None:
            return list(td.keys(True, True))
        if self._method.sides:
            keys = [*self._setup.in_keys, *self._chosen_by]
            keys = [*keys, *(under(side, key) for side in self._method.sides for key in keys)]
            return [*(key for key in keys if td.get(key, None) is not None), *self._method.reads(td)]
        chosen = [key for key in self._chosen_by if key in td]
        return [*self.in_keys, *chosen, *self._model.beside(td), *self._method.reads(td)]

    def explain(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        """What a call writes into ``td``, operation by operation."""
        try:
            return self._carried_out(Runner(self._setup, td, self._state))
        except Exception as error:
            missing = map(self._setup.leaves.missing, self._method.runs_on(td))
            for told in missing:
                if told is not None:
                    raise KeyError(told) from error
            raise

    def _carried_out(self, runner: Runner) -> dict[NestedKey, Any]:
        """What is written, with nothing left behind: no change of the model, no graph on what it keeps."""
        surroundings = all_of(
            torch.inference_mode(False) if torch.is_inference_mode_enabled() else None,
            None if torch.is_grad_enabled() else torch.enable_grad(),
            None if top_mode() is None else unwatched(),
        )
        with Undoing(), surroundings:
            try:
                written = self._written(runner)
            except BaseException:
                runner.graph.cut_off(self._model.root, everywhere=False)  # the traceback holds all of it
                raise
            if runner.graph.alive and not torch.compiler.is_compiling():
                setup = self._setup
                setup.keeps_anywhere = runner.graph.cut_off(self._model.root, everywhere=setup.keeps_anywhere)
        self._note_keys(written)
        return written

    def _written(self, runner: Runner) -> dict[NestedKey, Any]:
        """The run and what explains it, off the tape."""
        found, base = runner.carefully(lambda: self._explained(runner))
        runner.base = None
        runner.overwritten.hand_back()
        written = base.written()
        written.update(runner.beside)
        written.update(base.told)
        if self._setup.question.values is not False:
            written.update(self._values(base))
        written.update(self._relevance(base, found))
        return written

    def _explained(self, runner: Runner) -> tuple[Mapping[NestedKey, Tensor], Run]:
        found = self._method.explain(runner, runner.td)
        runner.look_at_axes()
        return found, runner.as_it_is()  # some methods do not run the model on the inputs as they are

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
        """Keep ``out_keys`` true: some inputs have no relevance, modules may be called several times."""
        setup = self._setup
        without = [key for key in setup.sources if (self._entries.get(key) or self.entry(key)) not in written]
        if without:
            theirs = [entry for key in without for entry in (self.entry(key), ("spread", *parts_of(key)))]
            self.out_keys = [key for key in self.out_keys if key not in theirs]
        below = [parts_of(name) for name in self._method.writes_under]
        if setup.input_modules:
            below.append(parts_of(self._method.attribution_key))
        for ours in below:
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
        return table + shown(self._state)

    def report(self) -> Any:
        """The ledger of the last call as a table for ``rich.print``: one row per module or operation.

        Raises:
            RuntimeError: no ledger was kept.
        """
        return self._method.report(self._state)
