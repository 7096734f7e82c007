"""From a model to a TensorDictModule that also explains it: what all attribution methods share.

A method says what it changes while the model runs and how gradients become relevance; preparing inputs, asking for
targets, the backward pass and writing the results happen here, once.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.rule import Convention
from tdhook.targets import Seeds

__all__ = ["Attribution", "ExplainedModule", "Model"]


@dataclass(frozen=True)
class Model:
    """A user's model and the TensorDictModule it is run as: itself, or a wrapper of a plain module.

    Attributes:
        root: the model as it was given; dotted paths are relative to it.
        runner: the TensorDictModule that runs it.
        attributed: which of the keys it reads are attributed.
    """

    root: nn.Module
    runner: TensorDictModuleBase
    attributed: tuple[NestedKey, ...]

    @staticmethod
    def of(
        module: nn.Module, in_keys: Sequence[NestedKey] | None = None, out_keys: Sequence[NestedKey] | None = None
    ) -> Model:
        """Make a TensorDictModule of a plain module, or check the keys against those of one."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected an nn.Module or a TensorDictModule, got {type(module).__name__}")
        if not isinstance(module, TensorDictModuleBase):
            runner = TensorDictModule(module, list(in_keys or ["input"]), list(out_keys or ["output"]))
            return Model(module, runner, tuple(map(unravel_key, runner.in_keys)))
        for name, given, known in (
            ("in_keys", in_keys, module.in_keys),
            ("out_keys", out_keys, module.out_keys),
        ):
            for key in given or ():
                if unravel_key(key) not in map(unravel_key, known):
                    raise ValueError(f"Key {key} not in module.{name}: {list(known)}")
        attributed = module.in_keys if in_keys is None else in_keys
        return Model(module, module, tuple(map(unravel_key, attributed)))

    def submodule(self, path: str) -> nn.Module:
        """The module at a dotted path; below a TensorDictModule, paths may start inside the module that it wraps."""
        name = re.sub(r"\[(\w+)\]", r".\1", path).strip(".")
        modules = dict(self.root.named_modules())
        for candidate in (name, f"module.{name}"):
            if candidate in modules:
                return modules[candidate]
        raise ValueError(f"the model has no module {path!r}; it has {', '.join(n for n in modules if n)}")


@dataclass
class Record:
    """What one forward pass left behind.

    Attributes:
        sources: every tensor whose relevance is wanted, by key or module path.
        inputs: the values of the attributed inputs, on the graph.
        outputs: what the module wrote, on the graph.
        modules: outputs of the modules that were asked for by path, on the graph.
    """

    inputs: dict[NestedKey, Tensor]
    outputs: TensorDictBase
    modules: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[NestedKey, Tensor] = field(default_factory=dict)


class Attribution(ABC):
    """A configured attribution method.

    Args:
        attribute: keys to give relevance for: keys that the model reads, keys that a ``TensorDictModule`` inside it
            writes, or ``"all"`` of these; by default those it reads.
        attribution_key: where relevance is written: that of ``key`` under ``(attribution_key, key)``.
        use_inputs: whether inputs get relevance.
        input_modules: paths of modules whose outputs get relevance, under ``(attribution_key, path)``.
        target_modules: paths of modules whose outputs may be explained, as if they were keys.
    """

    def __init__(
        self,
        *,
        attribute: Sequence[NestedKey] | str | None = None,
        attribution_key: NestedKey = "attr",
        use_inputs: bool = True,
        input_modules: Sequence[str] | None = None,
        target_modules: Sequence[str] | None = None,
    ) -> None:
        if isinstance(attribute, str) and attribute != "all":
            raise ValueError(f"attribute={attribute!r} is neither 'all' nor a list of keys; write [{attribute!r}]")
        self.attribute = attribute if isinstance(attribute, str | None) else tuple(map(unravel_key, attribute))
        self.attribution_key: NestedKey = unravel_key(attribution_key)
        self.use_inputs = use_inputs
        self.input_modules = tuple(input_modules or ())
        self.target_modules = tuple(target_modules or ())

    @contextmanager
    def prepare(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Iterator[ExplainedModule]:
        """Explain ``module`` within a ``with`` block.

        Args:
            module: a TensorDictModule, or any module, which then reads ``"input"`` and writes ``"output"``.
            in_keys: keys that a plain module reads; of a TensorDictModule, those that are attributed.
            out_keys: keys that a plain module writes.

        Yields:
            A TensorDictModule that does what ``module`` does and writes relevance too.
        """
        explained = ExplainedModule(self, Model.of(module, in_keys, out_keys))
        try:
            yield explained
        finally:
            explained.close()

    def wrap(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> ExplainedModule:
        """Like :meth:`prepare`, to stay: goes wherever ``module`` went, with the same parameters under the same names."""
        return ExplainedModule(self, Model.of(module, in_keys, out_keys))

    def extra_in_keys(self) -> tuple[NestedKey, ...]:
        """Keys that the method reads besides those of the model."""
        return ()

    @abstractmethod
    def start(self, model: Model) -> Any:
        """What the method has to work out once per model; its state is kept by the explained module."""

    @abstractmethod
    def active(self, state: Any, model: Model, td: TensorDictBase) -> AbstractContextManager[Convention]:
        """Change the model for one forward pass; yields the convention in which gradients travel then."""

    @abstractmethod
    def seeds(self, record: Record, td: TensorDictBase, flow: Convention) -> Seeds:
        """Where the backward pass starts."""

    @abstractmethod
    def relevance(self, state: Any, value: Tensor, grad: Tensor, flow: Convention) -> Tensor:
        """The relevance of ``value``, given what the backward pass brought to it."""

    def differentiable(self, inputs: TensorDictBase, td: TensorDictBase) -> TensorDictBase:
        """Those of the inputs that are attributed, as the leaves of the graph."""
        return inputs

    def extras(self, record: Record) -> dict[NestedKey, Any]:
        """Further entries to write."""
        return {}


class ExplainedModule(TensorDictModuleBase):
    """Does what a model does and writes what each input contributed.

    Parameters, buffers and submodules are the model's own, under the same names: ``state_dict``, optimisers, weight
    synchronisation, ``to`` and ``train`` see the model.
    """

    def __init__(self, method: Attribution, model: Model) -> None:
        super().__init__()
        # The very dictionaries of the model, so that whatever is registered there later is seen here too.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = model.root.__dict__[registry]
        self.__dict__["_model"] = model
        self.training = model.root.training
        self._method = method
        self._closed = False
        self._unflattened: set[int] = set()
        self._told: set[NestedKey] = set()
        self._paths = {path: model.submodule(path) for path in (*method.input_modules, *method.target_modules)}
        prefix = _parts(method.attribution_key)
        sources = [*_attributed_keys(method, model), *method.input_modules]
        self.in_keys = list(dict.fromkeys([*map(unravel_key, model.runner.in_keys), *method.extra_in_keys()]))
        self.out_keys = [*model.runner.out_keys, *((*prefix, *_parts(key)) for key in sources)]
        self._state = method.start(model)

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

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the model on ``tensordict`` and write its outputs and the relevance of its inputs into it.

        Args:
            tensordict: holds the keys that the model reads; any batch size.

        Returns:
            The same TensorDict, with the model's outputs and relevance under ``(attribution_key, key)``, all detached.

        Raises:
            KeyError: a key is missing.
            ValueError: the batch is empty, a value that is explained is not finite, the target depends on no input.
        """
        if self._closed:
            raise RuntimeError(
                "this explained module ended with its `with` block; use `.wrap(module)` for one that lasts"
            )
        with torch.inference_mode(False), torch.enable_grad():
            written = self._explain(tensordict)
        for key, value in written.items():
            tensordict.set(key, value)
        return tensordict

    def _explain(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        self._check(td)
        dims = td.batch_dims
        if dims in self._unflattened:
            return self._explain_flat(td)
        try:
            return self._run(td)
        except (RuntimeError, ValueError, IndexError) as error:
            # Layers of fixed rank (convolutions, batch norm) take one batch axis; a bare call would fail for them too.
            if dims == 1 or not _may_be_rank(error):
                raise
            try:
                written = self._explain_flat(td)
            except (RuntimeError, ValueError, IndexError):
                raise error from None
            self._unflattened.add(dims)
            return written

    def _explain_flat(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        written = self._run(td.reshape(-1))
        return {
            key: value.unflatten(0, td.batch_size) if isinstance(value, Tensor) and td.batch_dims
            else value.squeeze(0) if isinstance(value, Tensor) else value
            for key, value in written.items()
        }  # fmt: skip

    def _check(self, td: TensorDictBase) -> None:
        missing = [key for key in self.in_keys if td.get(key, None) is None]
        if missing:
            known = ", ".join(sorted(map(str, td.keys(True, True)))) or "nothing"
            raise KeyError(
                f"key {missing[0]!r} is missing from the TensorDict, which has {known}; the explained module reads "
                f"{self.in_keys}"
            )
        if td.numel() == 0 or any(value.numel() == 0 for value in map(td.get, self.in_keys) if isinstance(value, Tensor)):
            raise ValueError(f"there is nothing to explain: the TensorDict is empty (batch size {list(td.batch_size)})")

    def _run(self, td: TensorDictBase) -> dict[NestedKey, Any]:
        method, model = self._method, self._model
        work, inputs = self._leaves(td)
        before = dict(work.items(True, True))
        with ExitStack() as stack:
            flow = stack.enter_context(method.active(self._state, model, td))
            modules, keys = stack.enter_context(self._captured())
            result = model.runner(work)
        changed = [key for key, value in result.items(True, True) if before.get(key) is not value]
        record = Record(inputs, result.select(*changed), modules, keys)
        seeds = method.seeds(record, td, flow)
        written: dict[NestedKey, Any] = {key: _detached(result.get(key)) for key in changed}
        written |= method.extras(record)
        written |= self._relevance(record, seeds, flow, td)
        return written

    def _leaves(self, td: TensorDictBase) -> tuple[TensorDictBase, dict[NestedKey, Tensor]]:
        """A shallow copy of ``td`` in which attributed inputs are leaves of a new graph."""
        work = td.contiguous() if isinstance(td, LazyStackedTensorDict) else td.copy()
        inputs: dict[NestedKey, Tensor] = {}
        for key, value in list(work.items(True, True)):
            if isinstance(value, Tensor) and (value.is_inference() or value.requires_grad):
                work.set(key, value.clone() if value.is_inference() else value.detach())
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
        if not inputs and not self._method.input_modules:
            raise ValueError(
                f"none of the inputs ({', '.join(map(repr, self._model.attributed))}) is floating-point, so none can "
                "have relevance; name the module that embeds them in input_modules"
            )
        return work, inputs

    def _tell_once(self, key: NestedKey, value: Tensor) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(
                f"input {key!r} is {value.dtype}, which has no gradient: it gets no relevance entry", stacklevel=2
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

    def _relevance(
        self, record: Record, seeds: Seeds, flow: Convention, td: TensorDictBase
    ) -> dict[NestedKey, Tensor]:
        method = self._method
        wanted = _attributed_keys(method, self._model)
        if method.attribute == "all":
            wanted = (*wanted, *(key for key in record.keys if key not in wanted))
        sources: dict[NestedKey, Tensor] = {}
        for key in wanted:
            if key in record.inputs:
                sources[key] = record.inputs[key]
            elif key in record.keys and record.keys[key].is_floating_point():
                sources[key] = record.keys[key]
        sources |= {(path,): record.modules[path] for path in method.input_modules}
        sources = {key: value for key, value in sources.items() if value.requires_grad}
        for key, z, grad in zip(seeds.keys, seeds.tensors, seeds.grads, strict=True):
            if not z.requires_grad:
                raise ValueError(
                    f"the target {key!r} does not depend on any attributed input ({', '.join(map(repr, sources))})"
                )
            if not torch.compiler.is_compiling() and not bool(grad.isfinite().all()):
                raise ValueError(self._not_finite(key, td))
        rounds = range(seeds.several) if seeds.several else (None,)
        pulled = [
            torch.autograd.grad(
                seeds.tensors,
                list(sources.values()),
                [grad if i is None else grad[i] for grad in seeds.grads],
                retain_graph=i is not None and i != rounds[-1],
                allow_unused=True,
            )
            for i in rounds
        ]
        if all(g is None for grads in pulled for g in grads):
            raise ValueError(
                f"the target {', '.join(map(repr, seeds.keys))} does not depend on any attributed input "
                f"({', '.join(map(repr, sources))})"
            )
        prefix = _parts(method.attribution_key)
        written: dict[NestedKey, Tensor] = {}
        for i, (key, value) in enumerate(sources.items()):
            each = [torch.zeros_like(value) if grads[i] is None else grads[i] for grads in pulled]
            relevance = [method.relevance(self._state, value.detach(), g.detach(), flow) for g in each]
            written[(*prefix, *_parts(key))] = (
                relevance[0] if seeds.several is None else torch.stack(relevance, dim=record.outputs.batch_dims)
            )
        return written

    def _not_finite(self, target: NestedKey, td: TensorDictBase) -> str:
        for key in self.in_keys:
            value = td.get(key)
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                count = int((~value.isfinite()).sum())
                return f"input {key!r} has {count} NaN or infinite values of {value.numel()}: there is nothing to explain"
        return f"the value of the target {target!r} is NaN or infinite though all inputs are finite: {self._culprit(td)}"

    def _culprit(self, td: TensorDictBase) -> str:
        """The first module whose output is not finite."""
        found: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                    found.append(f"module {name!r} ({type(module).__name__}) is the first to return such a value")

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name, module in self._model.root.named_modules():
                stack.callback(module.register_forward_hook(watch(name)).remove)
            self._model.runner(td.copy())
        return found[0] if found else "it arises outside of any module"


def _parts(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _attributed_keys(method: Attribution, model: Model) -> tuple[NestedKey, ...]:
    if isinstance(method.attribute, tuple):
        known = {unravel_key(k) for m in model.runner.modules() if isinstance(m, TensorDictModuleBase) for k in m.out_keys}
        for key in method.attribute:
            if key not in known and key not in model.attributed:
                names = ", ".join(map(repr, [*model.attributed, *sorted(known, key=str)]))
                raise ValueError(f"attribute names {key!r}, which the model neither reads nor writes; it has {names}")
        return method.attribute
    return model.attributed if method.use_inputs else ()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _may_be_rank(error: Exception) -> bool:
    """Whether an error may come from the number of axes; ours, which name a key, do not."""
    return any(word in str(error) for word in ("dim", "shape", "size", "expected", "Expected", "axis"))


def _capture_output(path: str, found: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module {path!r} ({type(module).__name__}) returned {type(output).__name__}; only modules that return one "
                "tensor can be attributed or explained by path"
            )
        if not output.requires_grad and output.is_floating_point():
            output = output.detach().requires_grad_()
        found[path] = output
        return output

    return hook


def _capture_keys(attribute: tuple[NestedKey, ...] | str, found: dict[NestedKey, Tensor]) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, TensorDictBase):
            return
        for key in map(unravel_key, module.out_keys):
            value = output.get(key, None)
            if isinstance(value, Tensor) and (attribute == "all" or key in attribute):
                found[key] = value

    return hook
