"""The explained module: one forward pass, one backward pass, and what is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.binding import named_tensors
from tdhook.balance import balance
from tdhook.contexts import Conditions, Model, Record
from tdhook.ledger import Ledger
from tdhook.operations.mutation import Mutated
from tdhook.state import dense_copy, restored
from tdhook.targets import Seeds, require_dependence

if TYPE_CHECKING:
    from rich.table import Table

    from tdhook.contexts import Attribution

__all__ = ["ExplainedModule"]


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
        self._closed = self._ran = False
        self.__dict__["ledger"] = None
        self._told: set[NestedKey] = set()
        self._paths = {
            path: model.submodule(path) for path in (*method.input_modules, *method.target_modules)
        }
        prefix = _parts(method.attribution_key)
        sources = [*method.attributed_keys(model), *method.input_modules]
        self.in_keys = list(dict.fromkeys([*map(unravel_key, model.runner.in_keys), *method.extra_in_keys()]))
        self.out_keys = [*model.runner.out_keys, *((*prefix, *_parts(key)) for key in sources)]
        self.out_keys += method.extra_out_keys()
        self._state = method.start(model) if state is None else state

    def close(self) -> None:
        """End the module's life: a later call is an error."""
        self._closed = True

    def train(self, mode: bool = True) -> ExplainedModule:
        """Set the mode of the model, too."""
        super().train(mode)
        self._model.root.training = mode
        return self

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
        self._check(td)
        with torch.inference_mode(False), torch.enable_grad():
            written = self._run(td)
        for key, value in written.items():
            td.set(key, value)
        return td

    def _check(self, td: TensorDictBase) -> None:
        missing = [key for key in self.in_keys if td.get(key, None) is None]
        if missing:
            known = ", ".join(sorted(map(str, td.keys(True, True)))) or "nothing"
            raise KeyError(
                f"key {missing[0]!r} is missing from the TensorDict, which has {known}; the explained module reads "
                f"{self.in_keys}"
            )
        values = (td.get(key) for key in self.in_keys)
        if 0 in td.batch_size or any(value.numel() == 0 for value in values if isinstance(value, Tensor)):
            raise ValueError(
                f"there is nothing to explain: the TensorDict is empty (batch size {list(td.batch_size)})"
            )

    def _run(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        try:
            with nullcontext() if self._ran else restored(self._model.root, always=False):
                written = self._attempt(td)
        except Mutated:  # the model overwrites tensors: from now on it is run with care
            written = self._attempt(td)
        self._ran = True
        return written

    def _attempt(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        method = self._method
        with self._forward_pass(td) as (record, conditions):
            seeds = method.seeds(record, td, conditions.flow)
            sources = self._sources(record)
            relevance = self._relevance(record, sources, seeds, conditions, td)
            accounts = self._accounts(record, sources, seeds, conditions)
        return {**_entries(record.outputs), **method.extras(record), **relevance, **accounts}

    @contextmanager
    def _forward_pass(self, td: TensorDictBase) -> Iterator[tuple[Record, Conditions]]:
        """Run the model, and keep it as it was run for the backward pass within."""
        work, inputs = self._leaves(td)
        with self._method.active(self._state, self._model, td) as conditions:
            if conditions.overwrites:
                for key, value in inputs.items():
                    work.set(key, value.clone())
            with conditions.forward, self._captured() as (modules, keys):
                outputs, flat = self._model.run(work)
            if outputs.batch_size != td.batch_size:
                raise ValueError(
                    f"the model returned a TensorDict of batch size {list(outputs.batch_size)} for one of "
                    f"{list(td.batch_size)}, where its outputs cannot be written; wrap it in a module that moves "
                    "the new axes behind those of the batch"
                )
            yield Record(inputs, outputs, flat, modules, keys), conditions

    def rehearse(self, td: TensorDictBase) -> None:
        """Run the model on its tape, and leave everything as it was."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            restored(self._model.root),
            self._forward_pass(td),
        ):
            pass

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
        from tdhook.reports import ledger_table

        if self.ledger is None:
            raise RuntimeError(
                "there is no ledger to report: give LRP(..., ledger=True) and call the explained module"
            )
        return ledger_table(self.ledger)

    def _leaves(self, td: TensorDictBase) -> tuple[TensorDictBase, dict[NestedKey, Tensor]]:
        """A shallow copy of ``td`` in which attributed inputs are leaves of a new graph."""
        work = dense_copy(td)
        inputs: dict[NestedKey, Tensor] = {}
        for key, value in list(work.items(True, True)):
            if isinstance(value, Tensor):
                work.set(key, _usable(value))
        if not self._method.use_inputs:
            return work, inputs
        candidates = work.select(*self._model.attributed)
        for key, value in self._method.differentiable(candidates, td).items(True, True):
            if not isinstance(value, Tensor):
                continue
            if not value.is_floating_point():
                self._tell_once(key, value)
                continue
            inputs[key] = value.detach().requires_grad_()
            work.set(key, inputs[key])
        if not inputs and not self._method.input_modules and self._method.attribute is None:
            raise ValueError(
                f"none of the inputs ({', '.join(map(repr, self._model.attributed))}) is floating-point, so none can "
                "have relevance; name the module that embeds them in input_modules"
            )
        return work, inputs

    def _tell_once(self, key: NestedKey, value: Tensor) -> None:
        if key not in self._told:
            self._told.add(key)
            entry = (*_parts(self._method.attribution_key), *_parts(key))
            self.out_keys = [known for known in self.out_keys if known != entry]
            warnings.warn(
                f"input {key!r} is {value.dtype}, which has no gradient: it gets no relevance entry",
                stacklevel=2,
            )

    @contextmanager
    def _captured(self) -> Iterator[tuple[dict[str, Tensor], dict[NestedKey, Tensor]]]:
        """Collect outputs of the modules and keys whose relevance is asked for."""
        modules: dict[str, Tensor] = {}
        keys: dict[NestedKey, Tensor] = {}
        handles = [m.register_forward_hook(_capture_output(path, modules)) for path, m in self._paths.items()]
        attribute = self._method.attribute
        if attribute is not None:
            for module in self._model.runner.modules():
                if isinstance(module, TensorDictModuleBase):
                    handles.append(module.register_forward_hook(_capture_keys(attribute, keys)))
        try:
            yield modules, keys
        finally:
            for handle in handles:
                handle.remove()

    def _sources(self, record: Record) -> dict[NestedKey, Tensor]:
        """The tensors whose relevance is asked for, by the key to write it under."""
        method = self._method
        found = {**record.keys, **record.inputs}
        wanted = list(method.attributed_keys(self._model))
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
        method = self._method
        require_dependence(seeds, sources, [z.requires_grad for z in seeds.tensors])
        if not torch.compiler.is_compiling():
            for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
                # Outputs that are not explained may be infinite, as masked logits are.
                explained = torch.where(grad == 0, 0.0, z.detach())
                if not bool((grad.isfinite() & explained.isfinite()).all()):
                    raise ValueError(self._not_finite(key, td))
        rounds = range(seeds.several) if seeds.several else (None,)
        pulled = [
            torch.autograd.grad(
                seeds.tensors,
                list(sources.values()),
                [grad if i is None else grad[i] for grad in seeds.grads],
                retain_graph=conditions.ledger is not None or (i is not None and i != rounds[-1]),
                allow_unused=True,
            )
            for i in rounds
        ]
        require_dependence(seeds, sources, [any(g is not None for grads in pulled for g in grads)])
        prefix = _parts(method.attribution_key)
        written: dict[NestedKey, Tensor] = {}
        for i, (key, value) in enumerate(sources.items()):
            grads = (torch.zeros_like(value) if each[i] is None else each[i].detach() for each in pulled)
            relevance = [
                method.relevance(self._state, value.detach(), grad, conditions.flow) for grad in grads
            ]
            if key not in record.inputs:
                relevance = [record.shaped(r) for r in relevance]
            path = (*prefix, *_parts(key))
            written[path] = (
                relevance[0]
                if seeds.several is None
                else torch.stack(relevance, dim=record.outputs.batch_dims)
            )
        return written

    def _not_finite(self, target: NestedKey, td: TensorDictBase) -> str:
        for key in self.in_keys:
            value = td.get(key)
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                count = int((~value.isfinite()).sum())
                return f"input {key!r} has {count} NaN or infinite values among its {value.numel()}"
        culprit = self._culprit(td)
        return (
            f"the value of the target {target!r} is NaN or infinite though all inputs are finite: {culprit}"
        )

    def _culprit(self, td: TensorDictBase) -> str:
        """The first module whose output is not finite."""
        found: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                    found.append(
                        f"module {name!r} ({type(module).__name__}) is the first to return such a value"
                    )

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name, module in self._model.root.named_modules():
                stack.callback(module.register_forward_hook(watch(name)).remove)
            with restored(self._model.root):
                self._model.run(dense_copy(td))
        return found[0] if found else "it arises outside of any module"


def _parts(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _usable(value: Tensor) -> Tensor:
    """The value, off the caller's graph; what was made in inference mode has to be copied to be saved for backward."""
    if not torch.compiler.is_compiling() and value.is_inference():
        return value.clone()
    return value.detach() if value.requires_grad else value


def _entries(td: TensorDictBase) -> dict[NestedKey, Any]:
    return {
        key: value.detach() if isinstance(value, Tensor) else value for key, value in td.items(True, True)
    }


def _capture_output(path: str, found: dict[str, Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module {path!r} ({type(module).__name__}) returned {type(output).__name__}; only modules that return "
                "one tensor can be attributed or explained by path"
            )
        if not output.requires_grad and output.is_floating_point():
            output = output.detach().requires_grad_()
        found[path] = output
        return output

    return hook


def _capture_keys(
    attribute: tuple[NestedKey, ...] | str, found: dict[NestedKey, Tensor]
) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, TensorDictBase):
            return
        for key in map(unravel_key, module.out_keys):
            value = output.get(key, None)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if attribute == "all" or key in attribute:
                found[key] = value if value.requires_grad else value.detach().requires_grad_()
                if found[key] is not value:  # made of integers by a frozen module: here the graph begins
                    output.set(key, found[key])

    return hook
