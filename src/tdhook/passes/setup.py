"""The setup of an explained module: what is known of a model and of what is asked, kept from call to call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.keys import is_below
from tdhook.models.capture import Captured, module_path
from tdhook.models.holding import modules_of
from tdhook.models.model import Apart, Model
from tdhook.models.sites import Performance
from tdhook.models.state import Memory, made_in_inference_mode
from tdhook.models.turns import Turn
from tdhook.passes.axes import Axes
from tdhook.passes.backward import PullBack
from tdhook.passes.heads import Heads
from tdhook.passes.inside import Inside
from tdhook.passes.leaves import Choose, Leaves
from tdhook.tape.fronts import Fronts
from tdhook.targets.base import Seeder
from tdhook.targets.through import OfOperations

__all__ = ["LAYOUTS", "Attribute", "Question", "Setup", "inner_modules"]

Attribute: TypeAlias = "tuple[NestedKey, ...] | str | Choose | None"

LAYOUTS = ("rows", "axis", "alone")
"""How variants of a batch lie side by side: as more elements along its first axis, along an axis of their own, or not
at all, one after the other."""


@dataclass(frozen=True)
class Question:
    """What a method asks of any model.

    Attributes:
        target: what is explained.
        attribute: keys to attribute, ``"all"``, a choice among the inputs, or ``None`` for the inputs.
        use_inputs: whether inputs are attributed.
        input_modules: paths of modules whose outputs are attributed.
        target_modules: paths of modules whose outputs may be explained.
        values: paths of modules, and keys, whose values are written; or whether those of what is attributed are.
        memory_budget: bytes that the gradients of several targets may take together.
        changes_inputs: whether inputs are changed even where they are not attributed.
        operations: selectors of single operations whose outputs are attributed.
    """

    target: Seeder
    attribute: Attribute = None
    use_inputs: bool = True
    input_modules: tuple[str, ...] = ()
    target_modules: tuple[str, ...] = ()
    values: bool | tuple[NestedKey, ...] = False
    memory_budget: int | None = None
    changes_inputs: bool = False
    operations: tuple[OfOperations, ...] = ()


class Setup:
    """What is known of one model that one question is asked of.

    Args:
        model: the model.
        question: what is asked.

    Attributes:
        paths: the modules whose outputs are wanted, by path.
        attributed: keys that are asked for, as far as they are known before the model runs.
        watched: inner keys that are collected; ``"all"`` of them.
        in_keys: what has to be in a TensorDict.
        leaves: makes the leaves of each run.
        pull_back: runs backward passes.
        heads: what of the model is behind the target.
        turn: the right to change the model for a while, which one thread at a time has.
        of_inference: whether modules may hold tensors that were made in inference mode.
        memory: which modules may change what they hold when they run.
        keeps_anywhere: whether values of its runs may be kept anywhere, and not only on the model, nor are they young.
        axes: which axes of the outputs of modules are the batch's.
        fronts: whether what variants go back through alike may be gone through once.
        inside: the places inside the model that the target names, and the operations that are attributed.
        meant: which operations the latter are, as the last run told that was the model's own.
        apart: how the model returns a TensorDict of its own, if it was seen to.
        overwritten: entries beside the attributed ones that the model writes to in place, as far as was seen.
        begins_finite: whether the target was seen to be a number on references, where ways begin.
        layout: how variants of a batch leave each other alone, as far as was seen: one of :data:`LAYOUTS`.

    Raises:
        ValueError: the question names a module or a key that the model does not have.
    """

    def __init__(self, model: Model, question: Question) -> None:
        question = _resolved(model, question)
        self.model, self.question = model, question
        self.attribute, self.input_modules = question.attribute, question.input_modules
        self.target_modules = question.target_modules
        named = () if isinstance(question.values, bool) else question.values
        places = (*question.target.places, *question.operations)
        named_keys = bool(named) or isinstance(question.attribute, tuple) or bool(places)
        known = _inner_keys(model) if named_keys else set()
        self.valued_keys = [key for key in named if key in known or key in model.attributed]
        self.valued_modules = [_path(key) for key in named if key not in self.valued_keys]
        self.inside = Inside.of(model, places, known) if places else Inside()
        self.meant: dict[Performance, OfOperations] = {}
        inside = self.inside.paths
        paths = (*question.input_modules, *question.target_modules, *self.valued_modules, *inside)
        self.paths: Mapping[str, nn.Module] = {path: model.submodule(module_path(path)) for path in paths}
        self.attributed = _attributed(model, question, known)
        self.watched = _watched(question.attribute, [*self.valued_keys, *self.inside.keys])
        reads = [key for key in map(unravel_key, model.runner.in_keys) if not model.made.get(key)]
        self.in_keys = list(dict.fromkeys([*reads, *question.target.in_keys]))
        self.apart: Apart | None = None
        self.layout = LAYOUTS[0]
        self.begins_finite = False
        self.overwritten: set[NestedKey] = set()
        changed = question.use_inputs or question.changes_inputs
        inputs = question.attribute if callable(question.attribute) else changed
        others = bool(question.input_modules) or question.attribute is not None
        named_inputs = question.attribute if isinstance(question.attribute, tuple) else ()
        are_all = not (question.input_modules or question.operations)
        for key in named_inputs:
            are_all = are_all and any(is_below(one, key) or is_below(key, one) for one in model.attributed)
        alone = named_inputs if named_inputs and are_all else None
        self.leaves = Leaves(model, self.in_keys, inputs, others, named_inputs, alone)
        self.pull_back = PullBack(question.memory_budget)
        self.heads = Heads(model.runner, question.target.explains)
        self.turn = Turn(modules_of(model.root).values())
        self.memory = Memory(model.root)
        self.of_inference = made_in_inference_mode(self.turn.modules)
        self.keeps_anywhere = True
        self.fronts = Fronts()
        asked = (question.input_modules, question.target_modules, self.valued_modules)
        self.axes = Axes(partial(self.inside.passes_only, asked=asked))

    def asking(self, target: Seeder) -> Setup:
        """The same for another target, which explains the same outputs."""
        other = copy.copy(self)
        other.question = replace(self.question, target=target)
        return other

    def axis(self, batch: tuple[int, ...], name: str, output: Tensor, module: nn.Module) -> int:
        """Which axis of a module's output is that of the batch."""
        return self.axes.of(name, type(module).__name__, tuple(output.shape), batch)

    @property
    def collects(self) -> bool:
        """Whether values from inside the model are collected."""
        return bool(self.paths) or self.watched is not None or bool(self.inside.operations)

    def collecting(self, captured: Captured) -> AbstractContextManager[None]:
        """Collect values from inside the model."""
        return captured.within(self.paths, self.model.runner, self.watched)

    @property
    def sources(self) -> list[NestedKey]:
        """The keys that relevance is written for, as far as they are known before the model runs."""
        return [*self.attributed, *self.input_modules, *map(repr, self.question.operations)]


def _resolved(model: Model, question: Question) -> Question:
    """The same, with keys among ``input_modules`` as keys: what is no path of a module, and a key that is known."""
    others = [path for path in question.input_modules if not _is_module(model, path)]
    known = _inner_keys(model) | set(model.attributed) if others else set()
    keys = tuple(key for key in map(unravel_key, others) if key in known)
    if not keys:
        return question
    if isinstance(question.attribute, tuple):
        before = question.attribute
    elif question.attribute is None:
        before = tuple(model.attributed) if question.use_inputs else ()
    else:
        raise ValueError(f"input_modules names {keys[0]!r}, a key: name it in attribute")
    modules = tuple(path for path in question.input_modules if unravel_key(path) not in keys)
    attribute = tuple(dict.fromkeys((*before, *keys)))
    uses = question.use_inputs or not set(attribute).isdisjoint(model.attributed)
    return replace(question, attribute=attribute, input_modules=modules, use_inputs=uses)


def _is_module(model: Model, path: NestedKey) -> bool:
    try:
        model.submodule(module_path(_path(path)))
    except ValueError:
        return False
    return True


def inner_modules(model: Model, question: Question) -> dict[str, list[nn.Module]]:
    """By name, the modules inside a model whose relevance is asked for; of a key, those that write or read it."""
    question, places = _resolved(model, question), question.target.places
    inside = Inside.of(model, places, _inner_keys(model)) if places else Inside()
    paths = (*question.input_modules, *question.target_modules, *inside.paths)
    found = {path: [model.submodule(module_path(path))] for path in paths}
    named = question.attribute if isinstance(question.attribute, tuple) else ()
    keys, all_ = {*named, *inside.keys}, question.attribute == "all"
    for module in model.runner.modules() if keys or all_ else ():
        if not isinstance(module, TensorDictModuleBase) or _holds_others(module):
            continue
        for key in map(unravel_key, (*module.in_keys, *module.out_keys)):
            if (key in keys or all_) and key not in model.attributed:
                found.setdefault(str(key), []).append(module)
    return found


def _holds_others(module: TensorDictModuleBase) -> bool:
    return any(isinstance(m, TensorDictModuleBase) for m in module.modules() if m is not module)


def _path(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)


def _inner_keys(model: Model) -> set[NestedKey]:
    inner = (m for m in model.runner.modules() if isinstance(m, TensorDictModuleBase))
    return {unravel_key(key) for module in inner for key in module.out_keys}


def _attributed(model: Model, question: Question, known: set[NestedKey]) -> tuple[NestedKey, ...]:
    attribute = question.attribute
    if not isinstance(attribute, tuple):
        reads = tuple(key for key in model.attributed if not model.made.get(key))
        return reads if question.use_inputs else ()
    for key in attribute:
        if key not in known and key not in model.attributed:
            names = ", ".join(map(repr, [*model.attributed, *sorted(known, key=str)]))
            raise ValueError(
                f"attribute names {key!r}, which the model neither reads nor writes; it has {names}"
            )
    return attribute


def _watched(attribute: Attribute, valued: Sequence[NestedKey]) -> tuple[NestedKey, ...] | str | None:
    if isinstance(attribute, str):
        return attribute
    keys = (*(attribute if isinstance(attribute, tuple) else ()), *valued)
    return keys or None
