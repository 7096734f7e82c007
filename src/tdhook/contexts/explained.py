"""The explained module: one forward pass, one backward pass, and what is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Conditions, Record
from tdhook.keys import named_tensors, parts_of
from tdhook.models.capture import Captured, captured
from tdhook.models.model import Model
from tdhook.models.state import dense_copy, leaves_of, restored
from tdhook.passes.backward import PullBack
from tdhook.passes.diagnosis import is_explainable, why_not_finite
from tdhook.passes.graphs import Graphs
from tdhook.relevance.ledger.balance import balance
from tdhook.relevance.ledger.ledger import Ledger
from tdhook.tape.conditions import is_assumed_nonnegative
from tdhook.tape.origins import mark_nonnegative
from tdhook.tape.overwriting import Mutated
from tdhook.targets import Seeds, require_dependence

if TYPE_CHECKING:
    from rich.table import Table

    from tdhook.contexts.attribution import Attribution

__all__ = ["ExplainedModule"]

T = TypeVar("T")


class ExplainedModule(TensorDictModuleBase):
    """Does what a model does and writes what each input contributed.

    Parameters, buffers and submodules are the model's own, under the same names: ``state_dict``, optimisers, weight
    synchronisation, ``to`` and ``train`` see the model.

    Attributes:
        ledger: accounts of the last call, if they were asked for.
    """

    ledger: Ledger | None

    def __init__(self, method: Attribution, model: Model, state: Any = None) -> None:
        super().__init__()
        # The very dictionaries of the model, so that whatever is registered there later is seen here too.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = model.root.__dict__[registry]
        self.__dict__["_model"] = model
        self.training = model.root.training
        self._method = method
        self._closed = False
        self._moving: tuple[nn.Module, ...] | None = None
        self.__dict__["ledger"] = None
        self._told: set[NestedKey] = set()
        self._paths = {
            path: model.submodule(path) for path in (*method.input_modules, *method.target_modules)
        }
        self._attributed = method.attributed_keys(model)
        sources = [*self._attributed, *method.input_modules]
        self.in_keys = list(dict.fromkeys([*map(unravel_key, model.runner.in_keys), *method.extra_in_keys()]))
        self.out_keys = [*model.runner.out_keys, *map(self._entry, sources), *method.extra_out_keys()]
        # Some models say which of the entries that they read are attributed, and read others.
        chosen_by = None if getattr(model.runner, "reads_everything", False) else method.target_entries()
        self._chosen_by = chosen_by and [key for key in chosen_by if key not in self.in_keys]
        self._pull_back = PullBack(method.memory_budget)
        self._state = method.start(model) if state is None else state
        self._graphs = Graphs(self, method.compile)

    def close(self) -> None:
        """End the module's life: a later call is an error."""
        self._closed = True
        self._graphs.clear()

    def train(self, mode: bool = True) -> ExplainedModule:
        """Set the mode of the model, too."""
        super().train(mode)
        self._model.root.training = mode
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are made again.
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = Graphs(self, self._method.compile)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_model" not in self.__dict__:
                raise
            return getattr(self.__dict__["_model"].runner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a TensorDict and write its outputs and the relevance of its inputs into it.

        Args:
            *args: the TensorDict, which holds the keys that the model reads, with any batch size; or, as with any
                TensorDictModule, the tensors themselves in the order of ``in_keys``.
            **kwargs: the tensors by name.

        Returns:
            The same TensorDict, with the model's outputs and relevance under ``(attribution_key, key)``, all detached;
            or the values of ``out_keys``, if tensors were given.

        Raises:
            KeyError: a key is missing.
            ValueError: the batch is empty, a value that is explained is not finite, the target depends on no input.
        """
        if self._closed:
            raise RuntimeError(
                "this explained module ended with its `with` block; use `.wrap(module)` for one that lasts"
            )
        td = args[0] if args else kwargs.get("tensordict")
        if not isinstance(td, TensorDictBase):
            td = self.forward(named_tensors(self.in_keys, args, kwargs))
            values = tuple(td.get(key) for key in self.out_keys)
            return values[0] if len(values) == 1 else values
        if torch.compiler.is_compiling():
            from tdhook.passes.compiled import inline

            written = inline(self, td)
        elif self._graphs.wanted:
            from tdhook.passes.compiled import run

            written = run(self, td)
        else:
            written = self.explain(td)
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
        with torch.inference_mode(False), torch.enable_grad():
            return self._carefully(lambda: self._attempt(td))

    def rehearse(
        self, td: TensorDictBase, within: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Run the model on its tape, and leave everything as it was.

        Args:
            td: what to run it on, left as it is.
            within: makes a context to run it in.
        """

        def attempt() -> None:
            with within(), self._forward_pass(td):
                pass

        with torch.inference_mode(False), torch.enable_grad(), restored(self._model.root):
            self._carefully(attempt)

    def _carefully(self, attempt: Callable[[], T]) -> T:
        """Try, and try again where it turns out that the model overwrites tensors: now it is run with more care."""
        while True:
            try:
                if self._moving == ():
                    return attempt()
                with restored(self._model.root, always=False, among=self._moving) as held:
                    result = attempt()
                    moving = held.moved
            except Mutated:
                continue
            self._moving = moving
            return result

    def _attempt(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        method = self._method
        with self._forward_pass(td) as (record, conditions):
            seeds = method.seeds(record, td, conditions.flow)
            sources = self._sources(record)
            relevance = self._relevance(record, sources, seeds, conditions, td)
            accounts = self._accounts(record, sources, seeds, conditions)
        written = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in record.outputs.items(True, True)
        }
        return {**written, **method.extras(record), **relevance, **accounts}

    @contextmanager
    def _forward_pass(self, td: TensorDictBase) -> Iterator[tuple[Record, Conditions]]:
        """Run the model, and keep it as it was run for the backward pass within."""
        work, inputs = self._leaves(td)
        with self._method.active(self._state, self._model, td) as conditions:
            if conditions.overwrites:
                for key, value in inputs.items():
                    work.set(key, value.clone())
            with self._captured() as (modules, keys), conditions.forward:
                outputs, flat = self._model.run(work)
                outputs = self._method.derive(outputs, work)
            if outputs.batch_size != td.batch_size:
                raise ValueError(
                    f"the model returned a TensorDict of batch size {list(outputs.batch_size)} for one of "
                    f"{list(td.batch_size)}, where its outputs cannot be written; wrap it in a module that moves "
                    "the new axes behind those of the batch"
                )
            yield Record(inputs, outputs, flat, modules, keys), conditions

    def _captured(self) -> AbstractContextManager[Captured]:
        attribute = self._method.attribute
        if not self._paths and attribute is None:
            return nullcontext(({}, {}))
        return captured(self._paths, self._model.runner, attribute)

    def _leaves(self, td: TensorDictBase) -> tuple[TensorDictBase, dict[NestedKey, Tensor]]:
        """A shallow copy of ``td`` in which attributed inputs are leaves of a new graph."""
        work = self._readable(td)
        inputs: dict[NestedKey, Tensor] = {}
        if not self._method.use_inputs:
            return work, inputs
        for key, value in self._method.differentiable(work, self._model.attributed, td):
            if value.is_floating_point():
                inputs[key] = value.detach().requires_grad_()
                if is_assumed_nonnegative(key):
                    mark_nonnegative(inputs[key])
                work.set(key, inputs[key])
            else:
                self._tell_once(key, value)
        if not inputs and not self._method.input_modules and self._method.attribute is None:
            raise ValueError(
                f"none of the inputs ({', '.join(map(repr, self._model.attributed))}) is floating-point, so none can "
                "have relevance; name the module that embeds them in input_modules"
            )
        return work, inputs

    def _readable(self, td: TensorDictBase) -> TensorDictBase:
        """A shallow copy of ``td``; what the model reads is there, not empty, and off the caller's graph."""
        empty = 0 in td.batch_size
        work = td.copy() if empty else dense_copy(td)
        for key in self.in_keys:
            found = work.get(key, None)
            if found is None:
                known = ", ".join(sorted(map(str, td.keys(True, True)))) or "nothing"
                raise KeyError(
                    f"key {key!r} is missing from the TensorDict, which has {known}; the explained module reads "
                    f"{self.in_keys}"
                )
            for name, value in leaves_of(key, found):
                empty = empty or value.numel() == 0
                if value.is_inference() and not torch.compiler.is_compiling():
                    work.set(name, value.clone())  # else it could not be saved for the backward pass
                elif value.requires_grad:
                    work.set(name, value.detach())
        if empty:
            raise ValueError(
                f"there is nothing to explain: the TensorDict is empty (batch size {list(td.batch_size)})"
            )
        return work

    def _tell_once(self, key: NestedKey, value: Tensor) -> None:
        if key not in self._told:
            self._told.add(key)
            entry = self._entry(key)
            self.out_keys = [known for known in self.out_keys if known != entry]
            warnings.warn(
                f"input {key!r} is {value.dtype}, which has no gradient: it gets no relevance entry",
                stacklevel=2,
            )

    def _entry(self, key: NestedKey) -> tuple[str, ...]:
        """Where the relevance of a key is written."""
        return (*parts_of(self._method.attribution_key), *parts_of(key))

    def _sources(self, record: Record) -> dict[NestedKey, Tensor]:
        """The tensors whose relevance is asked for, by the key to write it under."""
        method = self._method
        found = {**record.keys, **record.inputs}
        wanted = list(self._attributed)
        if method.attribute == "all":
            wanted += [key for key in record.keys if key not in wanted]
        sources: dict[NestedKey, Tensor] = {key: found[key] for key in wanted if key in found}
        sources.update({(path,): record.modules[path] for path in method.input_modules})
        return {key: value for key, value in sources.items() if value.requires_grad}

    def _relevance(
        self,
        record: Record,
        sources: dict[NestedKey, Tensor],
        seeds: Seeds,
        conditions: Conditions,
        td: TensorDictBase,
    ) -> dict[NestedKey, Tensor]:
        """Run the backward pass."""
        require_dependence(seeds, sources, [z.requires_grad for z in seeds.tensors])
        for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
            if not is_explainable(z, grad):
                raise ValueError(why_not_finite(self._model, self.in_keys, key, td))
        pulled = self._pull_back(seeds, list(sources.values()), keep=conditions.ledger is not None)
        require_dependence(seeds, sources, [any(grad is not None for grad in pulled)])
        written: dict[NestedKey, Tensor] = {}
        several = seeds.several
        for (key, value), found in zip(sources.items(), pulled, strict=True):
            shape = value.shape if several is None else (several, *value.shape)
            arrived = value.new_zeros(shape) if found is None else found.detach()
            relevance = self._method.relevance(self._state, value.detach(), arrived, conditions.flow)
            if record.flat and key not in record.inputs:
                relevance = record.shaped(relevance, after=several is not None)
            if several is not None:
                relevance = relevance.movedim(0, record.outputs.batch_dims)
            written[self._entry(key)] = relevance
        return written

    def _accounts(
        self, record: Record, sources: dict[NestedKey, Tensor], seeds: Seeds, conditions: Conditions
    ) -> dict[NestedKey, Tensor]:
        """The ledger's entries, if one is kept."""
        if conditions.ledger is None:
            return {}
        leaves = {id(x): x for x in (*record.inputs.values(), *sources.values()) if x.is_leaf}
        found = list(leaves.values()) or list(sources.values())
        self.__dict__["ledger"] = conditions.ledger
        closed = balance(conditions.ledger, seeds, found, conditions.flow, record.outputs.batch_size)
        return {("ledger", name): value for name, value in closed.items()}

    def report(self) -> Table:
        """The ledger of the last call as a table for ``rich.print``: one row per module or operation.

        Raises:
            RuntimeError: no ledger was kept.
        """
        from tdhook.relevance.ledger.report import ledger_table

        if self.ledger is None:
            raise RuntimeError(
                "there is no ledger to report: give LRP(..., ledger=True) and call the explained module"
            )
        return ledger_table(self.ledger)
