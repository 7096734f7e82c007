"""Keywords that tdhook 0.3 has: translated, where a method is made, into a target and a choice of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict, cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from tdhook.conventions import Convention
from tdhook.passes.forward import Run
from tdhook.passes.leaves import Choose
from tdhook.targets import Seeder, Seeds, TargetLike, as_seeder
from tdhook.targets.base import Around

__all__ = ["Keywords03", "Translated", "copies_of", "translated"]

Init: TypeAlias = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]

# What it was for is done in another way.
_WITHOUT = {
    "init_attr_cache_in": "input_modules names the values inside the model that are attributed",
    "output_grad_callbacks": "a rule on the module changes what travels backwards through it",
    "cache_callback": "values=[...] writes the values of modules as they are, for you to change",
}


class Keywords03(TypedDict, total=False):
    """The keywords.

    Attributes:
        init_attr_targets: ``(outputs, extra) -> targets``, the tensors to explain, instead of ``target``.
        init_attr_inputs: ``(inputs, extra) -> inputs``, those to attribute.
        init_attr_grads: ``(targets, extra) -> relevance`` to start from; ones by default.
        additional_init_keys: the keys that make up ``extra``.
        use_outputs: whether the outputs are offered to ``init_attr_targets`` (``target_modules`` always are).
        clean_intermediate_keys: whether to leave out the copies of inputs and outputs under ``_mod_in``, ``_mod_out``.
    """

    init_attr_targets: Init | None
    init_attr_inputs: Init | None
    init_attr_grads: Init | None
    additional_init_keys: Sequence[NestedKey] | None
    use_outputs: bool
    clean_intermediate_keys: bool


@dataclass(frozen=True)
class Translated:
    """What the keywords come to.

    Attributes:
        target: what is explained.
        attribute: what chooses among the inputs, if anything does.
        copies: whether copies of inputs and outputs are written.
    """

    target: TargetLike
    attribute: Choose | None
    copies: bool


def translated(
    keywords: Keywords03, target: TargetLike, target_modules: Sequence[str] | None, from_ones: bool
) -> Translated:
    """What the keywords come to.

    Args:
        keywords: the keywords, as they were given.
        target: what is explained, if that is said otherwise.
        target_modules: paths of modules whose outputs are offered.
        from_ones: whether, without a target, the backward pass starts from ones.

    Raises:
        TypeError: there is no such keyword, or two that say the same.
    """
    for name, value in keywords.items():
        if name in _WITHOUT:
            if value is not None:
                raise TypeError(f"LRP has no {name}, which tdhook 0.3 has: {_WITHOUT[name]}")
        elif name not in Keywords03.__annotations__:
            raise TypeError(f"LRP() got an unexpected keyword argument {name!r}")
    targets, grads = keywords.get("init_attr_targets"), keywords.get("init_attr_grads")
    if target is not None and targets is not None:
        raise TypeError("give LRP a target or init_attr_targets, not both")
    extra = tuple(map(unravel_key, keywords.get("additional_init_keys") or ()))
    use_outputs = keywords.get("use_outputs", True)
    if targets is not None or grads is not None or extra or not use_outputs or (target is None and from_ones):
        modules = None if use_outputs else tuple(target_modules or ())
        target = _Initialised(target, from_ones, targets, grads, extra, modules)
    choose = keywords.get("init_attr_inputs")
    attribute = None if choose is None else _Chosen(choose, extra)
    return Translated(target, attribute, not keywords.get("clean_intermediate_keys", True))


@dataclass(frozen=True)
class _Chosen:
    """``init_attr_inputs``, as a choice among the inputs."""

    choose: Init
    extra: tuple[NestedKey, ...]

    def __call__(self, inputs: TensorDictBase, td: TensorDictBase) -> TensorDictBase:
        return _tensordict(self.choose(inputs, td.select(*self.extra)), "init_attr_inputs")


@dataclass(frozen=True, eq=False)
class _Initialised(Around):
    """``init_attr_targets`` and ``init_attr_grads``, as a target.

    Attributes:
        target: what is explained, unless ``targets`` says.
        from_ones: whether, without either, all outputs are, and the backward pass starts from ones.
        targets: ``(outputs, extra) -> targets``.
        grads: ``(targets, extra) -> relevance``.
        extra: the keys of ``extra``.
        modules: paths of the modules whose outputs alone are offered; ``None`` for the outputs of the model too.
    """

    target: TargetLike
    from_ones: bool
    targets: Init | None
    grads: Init | None
    extra: tuple[NestedKey, ...]
    modules: tuple[str, ...] | None

    def inner(self) -> Seeder:
        """What is explained, unless ``targets`` says."""
        return as_seeder(self.target)

    @property
    def explains(self) -> None:
        """Whatever the functions start from."""
        return

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        """The keys of ``extra``."""
        return self.extra

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds that the functions give."""
        if self.modules is not None:
            names = (*self.modules, *(f"{path}:" for path in self.modules))
            keys = list(outputs.keys())
            offered = [key for key in keys if isinstance(key, str) and key.startswith(names)]
            outputs = outputs.select(*offered)
        if self.targets is None and self.grads is None and not (self.from_ones and self.target is None):
            return self.inner()(outputs, inputs, flow)
        extra = inputs.select(*self.extra)
        if self.targets is not None:
            outputs = _tensordict(self.targets(outputs, extra), "init_attr_targets")
        elif self.target is not None:
            outputs = outputs.select(*self.inner()(outputs, inputs, flow).keys)
        if self.grads is None:
            grads = cast(TensorDictBase, torch.ones_like(outputs))
        else:
            grads = _tensordict(self.grads(outputs, extra), "init_attr_grads")
        keys = list(outputs.keys(True, True))
        if grads.batch_size != outputs.batch_size:
            raise ValueError("init_grads should have the same batch size as targets")
        if set(keys) != set(grads.keys(True, True)):
            raise ValueError("Targets and init_grads must have the same keys")
        return Seeds(keys, [outputs.get(key) for key in keys], [grads.get(key) for key in keys])


def copies_of(run: Run) -> dict[NestedKey, object]:
    """The copies of inputs and outputs that are written unless they are cleaned."""
    inputs: dict[NestedKey, object] = {key: value.detach() for key, value in run.inputs.items()}
    groups = {"_register_in": inputs, "_mod_in": inputs, "_mod_out": run.written()}
    return {
        (group, *((key,) if isinstance(key, str) else key)): value
        for group, entries in groups.items()
        for key, value in entries.items()
    }


def _tensordict(value: object, name: str) -> TensorDictBase:
    if not isinstance(value, TensorDictBase):
        raise ValueError(f"{name} function must return a TensorDict")
    return value
