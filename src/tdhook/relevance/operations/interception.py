"""Runs every operation of a forward pass under its rule."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook.conventions import Convention
from tdhook.relevance.operations.applied import Applied, is_ours
from tdhook.relevance.operations.asking import Asking
from tdhook.relevance.operations.in_place import overwritten, writing
from tdhook.relevance.operations.kernels import by_place, first_output, of_a_kernel, positional
from tdhook.relevance.operations.known import Known, on_a_copy
from tdhook.relevance.operations.norms import Norms
from tdhook.relevance.operations.parties import (
    COMPILED,
    DIFFERENTIATES,
    HIDDEN,
    OVERWRITES,
    TRANSFORMS,
    Unmatched,
)
from tdhook.relevance.operations.readings import DIFFERENCES, VALUES
from tdhook.relevance.operations.rulebook import Rulebook
from tdhook.relevance.operations.stand_ins import standing_in, while_alive
from tdhook.relevance.operations.table import ARITHMETIC
from tdhook.relevance.operations.units import Units
from tdhook.relevance.operations.watched import Pass
from tdhook.relevance.operations.written_out import in_parts
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.call import ALONE, Call, Run, Setting
from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors.names import relabels, writes_in_place
from tdhook.tape.as_one import inside_of, is_of_single_values
from tdhook.tape.entering import entered
from tdhook.tape.internals import (
    APPLIED_IN_TRANSFORMS,
    autocasting,
    is_without_derivative,
    overload_called,
    sees,
    through_transforms,
    transformed,
)
from tdhook.tape.modes import ONLY_TENSORS, answered, beneath
from tdhook.tape.own import NoDerivative
from tdhook.tape.sharded import moves_between_processes
from tdhook.tape.sparse import Live, at_fault
from tdhook.tape.trees import tree_leaves

__all__ = ["Interception"]


# What leaves derivatives as they are.
_SHIFTS = frozenset(("add", "sub"))
# What functions of torch take by the names of numpy as well.
_NAMES = {"axis": "dim", "keepdims": "keepdim"}


class Interception(Units):
    """While active, runs each torch function on the tape under the rule of its operation.

    Args:
        flow: the convention of the backward pass.
        modules: the model's modules by path.
        asking: asks a composite.
        defaults: whether what the composite leaves open has the rule of its operation in
            :mod:`~tdhook.relevance.operations.table`.
        unmatched: told ``(operation, path)`` of operations that nothing is known of.
        setting: what the calls of the plan share.
        batch_norm: the rule of batch norms that are called as functions, if they may be merged.

    Attributes:
        rules: finds the rules of operations.
    """

    def __init__(
        self,
        flow: Convention,
        modules: Mapping[str, nn.Module],
        asking: Asking,
        *,
        defaults: bool,
        unmatched: Callable[[str, str], None],
        setting: Setting = ALONE,
        batch_norm: Rule | None = None,
    ) -> None:
        super().__init__(modules, Norms(batch_norm, flow, setting), setting)
        self.asking, self._unmatched = asking, unmatched
        reading = VALUES if setting.reference is None else DIFFERENCES
        self.rules = Rulebook(asking, reading, flow, self.paths, defaults=defaults)
        while_alive(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        while_alive(self)

    def running(self, *, tracked: bool = False) -> AbstractContextManager[None]:
        """Watch one forward pass; ``tracked`` where the path of each operation has to be known."""
        self.asking.begin()
        follows = self.asking.by_path or tracked or self.observer is not None
        return self._followed(follows) if follows or self.guard.active else Pass(self)

    @contextmanager
    def _followed(self, follows: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if self.guard.active:
                stack.enter_context(self.guard.watching())
            if follows:
                stack.enter_context(self.paths.followed())
            stack.enter_context(Pass(self))
            yield

    def again(self) -> AbstractContextManager[None] | None:
        """Watch a part of the forward pass that is run once more, in which nothing must have been overwritten."""
        return None if self.guard.active else self._watching_again()

    @contextmanager
    def _watching_again(self) -> Iterator[None]:
        self.asking.refuse_again()
        before = self.dependence
        self.dependence = before.begin_again()
        try:
            with (
                nullcontext() if self.observer is None else self.observer.again(),
                Again(tuple(self.paths.modules.values())).unnoticed(),
                self.norms.again(),
                nullcontext() if self.setting.reference is None else self.setting.reference.aside(),
                standing_in(self),
                self,
            ):
                yield
        finally:
            self.dependence = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and types != ONLY_TENSORS and not self._paused:
            found = answered(self, func, types, args, kwargs)
            if found is not NotImplemented:
                return found
        rules = self.rules
        known = rules.known.get(func) or rules.learn(func)
        kwargs = kwargs or {}
        if known.overloaded and (called := overload_called(func, args, kwargs)) is not func:
            return self.__torch_function__(called, types, args, kwargs)
        if known.exposes:
            self._overwriters.expose()
        if known.aside:
            if known.assigns:
                self.guard.before(args[0])
            if known.begins_tape:
                self.dependence.look_closely(args[0])
            if known.assigns and self.dependence.has(args[0]) and self._is_followed(args[0]):
                result = func(*args, **kwargs)
                self._hide(known, args[0])
                return result
            if known.hooks and self.dependence.has(args[0]):
                hook = kwargs["hook"] if kwargs else args[1]
                if not moves_between_processes(hook):
                    return RemovableHandle(OrderedDict())  # what comes by is relevance, and no gradient
            return func(*args, **kwargs)
        if known.parts is not None:
            with self:
                return known.parts(*args, **kwargs)
        if kwargs:
            if known.schema is not None:
                args, kwargs = positional(known.schema, args, kwargs)
            else:
                if known.renames and ("axis" in kwargs or "keepdims" in kwargs):
                    kwargs = {_NAMES.get(name, name): value for name, value in kwargs.items()}
                args, kwargs = by_place(known.names, args, kwargs)
        if self.outdated.any:
            self.outdated.check((*args, *kwargs.values()) if kwargs else args)
        in_place = known.in_place or (bool(kwargs) and writes_in_place(func, kwargs))
        if known.uncounted and not torch.compiler.is_compiling():
            self.uncounted.add(args[0])
        if in_place and (self.guard.active or self.uncounted.holds(overwritten(args, kwargs))):
            self.guard.before(overwritten(args, kwargs))
        dependence = self.dependence
        if not torch.is_grad_enabled():  # as it is in heads, which have no part in what is explained
            if in_place and not (self._paused and self._overwriters.given is None):
                shifts = known.operation.name in _SHIFTS and not any(map(torch.is_tensor, args[1:]))
                for x in tree_leaves(overwritten(args, kwargs)):
                    if isinstance(x, Tensor) and dependence.has(x) and self._is_followed(x, shifts=shifts):
                        self._hide(known, x)
            return func(*args, **kwargs)
        reference = self.setting.reference
        if known.reads and reference is not None and not self._paused and not torch.compiler.is_compiling():
            return reference.read(known.operation.name, func(*args, **kwargs))
        try:
            live, foreign = dependence.look(args)
            if kwargs:
                below = dependence.look(kwargs.values())
                live, foreign = live or below[0], foreign or below[1]
        except Live as error:
            raise Live(error.x, known.operation.name, self.paths.current) from None
        if not self._paused and dependence.is_hidden(args, kwargs):
            raise NotImplementedError(TRANSFORMS.format(self.paths.current or "(model)"))
        if known.detaches and live and (known.uncounted or self._is_followed(args[0])):
            self.detached.add(args[0])
        given, given_by_name = args, kwargs
        ours = func is APPLIED_IN_TRANSFORMS and is_ours(args[0])
        if foreign and not ours:  # what a rule takes down for the run on the reference stays that object
            args, kwargs = dependence.constants_off((args, kwargs), own=live and not self._paused)
            if live and isinstance(func, Applied):
                func = func.with_constants((given, given_by_name), (args, kwargs))
        if in_place:
            # What is overwritten stays the tensor that the model holds.
            target = overwritten(given, given_by_name)
            return self._in_place(known, func, args, kwargs, target, live)
        if self._paused or not live:
            return func(*args, **kwargs)
        if known.quick and self.observer is None:
            entered = self._entered
            if entered is None or not entered.means(known.operation, args, kwargs):
                return func(*args, **kwargs)
        if known.refused:
            raise NotImplementedError(
                OVERWRITES.format(known.operation.name, self.paths.current or "(model)")
            )
        if ours:
            return func(*args, **kwargs)
        if func is APPLIED_IN_TRANSFORMS:
            # What it comes to outside of the transform is seen.
            with self:
                return through_transforms(func, args, kwargs)
        if known.differentiates:
            raise NotImplementedError(DIFFERENTIATES.format(self.paths.current or "(model)"))
        norm = self.norms.inside(args) if known.normalises else None
        selector, rule = (None, None) if norm else self.rules.find(known, args, kwargs, self._entered)
        if reference is not None and selector is None and is_of_single_values(func):
            with self:
                return inside_of(func)(*args, **kwargs)
        if known.normalises and rule is ARITHMETIC and selector is None:
            norm = self.norms.called(given, self)
        if norm is not None:
            return self._normalise(norm, func, args)
        return self._run(known, selector, rule, func, args, kwargs)

    def _in_place(self, known: Known, func: Any, args: Any, kwargs: Any, target: Any, live: bool) -> object:
        """Run a function that overwrites ``target``, which is among its arguments unless it was a constant there."""
        if self.detached.holds(target) and not (relabels(func) or self.dependence.has(target)):
            self._hide(known, target)
        if self._paused or not live or relabels(func):
            if live and not self.guard.active:
                self.guard.before(target)
            if live or relabels(func):
                return func(*writing(args, kwargs, target), **kwargs)
            result = func(*args, **kwargs)
            return target if result is overwritten(args, kwargs) else result
        if not self.guard.active:
            self.guard.before(target)
        selector, rule = self.rules.find(known, args, kwargs, self._entered)
        native = known.in_place and rule is not None and rule.native
        if native and self.observer is None:
            return self._run(known, selector, rule, func, writing(args, kwargs, target), kwargs)
        form = on_a_copy(func) if native else known.operation.function
        return self._overwrite(known, selector, rule, form, args, kwargs, target)

    def _hide(self, known: Known, target: Tensor) -> None:
        self.outdated.hide(target, HIDDEN.format(known.operation.name, self.paths.current or "(model)"))

    def applied(self, function: type, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply an autograd function, which no mode sees, as the operation of its name."""
        ours = is_ours(function) or moves_between_processes(function)
        if ours or self._paused or not self.watching:
            return apply(*args, **kwargs)
        func = Applied(function, apply)
        known = self.rules.known
        known[func] = self.rules.learn_function(func)
        try:
            with beneath(self):
                return self.__torch_function__(func, (), args, kwargs)
        finally:
            del known[func]

    @property
    def watching(self) -> bool:
        """Whether torch functions are seen right now."""
        return sees(self)

    def compiled(self, kind: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module that was compiled, in which nothing is seen, on constants; raise on anything else."""
        if self._paused or not self.watching or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if self.dependence.look((args, kwargs))[0]:
            raise NotImplementedError(COMPILED.format(self.paths.current or "(model)", kind))
        with torch.no_grad():
            return run(*args, **kwargs)

    def _applied(self, func: Applied, call: Call, run: Run) -> Any:
        """Apply an autograd function under its rule."""
        run = partial(self._overwriters.run, func.function, run=run)
        if self.setting.reference is None:
            return run(call)
        result, unseen = self._overwriters.wrote_unseen(call, run)
        if unseen:
            raise NotImplementedError(OVERWRITES.format(func.__name__, self.paths.current or "(model)"))
        return result

    def _overwrite(
        self, known: Known, selector: Any, rule: Any, func: Any, args: object, kwargs: Any, target: Any
    ) -> object:
        """Run the out-of-place form under its rule, then move its result to where it belongs."""
        kwargs = {key: value for key, value in kwargs.items() if key not in ("out", "inplace")}
        result = self._run(known, selector, rule, func, args, kwargs)
        self.guard.before(target)  # again: the rule has kept of it what it needs
        if target.shape != result.shape:
            target.resize_(result.shape)
        return target.copy_(result)

    def _run(self, known: Known, selector: Any, rule: Rule | None, func: Any, args: Any, kwargs: Any) -> Any:
        operation, rules = known.operation, self.rules
        if rule is None:
            inside = rules.reading.written_out(operation.name)
            if inside is not None:
                return in_parts(self, inside, func, args, kwargs)
            first = first_output(operation.name)
            if first is not None:
                return of_a_kernel(self, first, func, args, kwargs)
            inside = entered(func)
            if inside is not None:
                with self:
                    return inside(*args, **kwargs)
            result = func(*args, **kwargs)
            try:
                live = self.dependence.look((result,))[0]
            except Live as error:
                raise Live(error.x, operation.name, self.paths.current) from None
            if not live:
                reference = self.setting.reference
                return result if reference is None else reference.decision(result)
            if is_without_derivative(result):
                raise NoDerivative(self._in_words(known))
            self._unmatched(operation.name, self.paths.current)
            selector = Unmatched()
            rule = ARITHMETIC
        bound = known.bound(rule, rules.flow, rules.reading)
        call = Call(operation, func, args, kwargs, self.setting)
        try:
            if rules.reading.opens(rule):
                at_once = self._at_once(rule, call)
                if at_once is not None:
                    return at_once(call)
                with self:
                    return bound.run(call)
            run = bound.run
            if self.observer is not None:
                run = partial(self.observer.call, self.paths.current, selector, bound)
            return self._applied(func, call, run) if isinstance(func, Applied) else run(call)
        except NoDerivative:
            raise NoDerivative(self._in_words(known)) from None
        except RuntimeError as error:
            odd = at_fault(error, (args, kwargs))
            if odd is None:
                raise
            raise Live(odd, operation.name, self.paths.current) from error

    def _in_words(self, known: Known) -> str:
        return f"`{known.operation.name}` in module `{self.paths.current or '(model)'}`"

    def _at_once(self, rule: Rule, call: Call) -> Run | None:
        """How a call is made without writing it out, if nobody asks for what is inside."""
        unseen = self.observer is None and self._entered is None
        if not unseen or transformed() or autocasting():
            return None
        return self.rules.at_once(rule, call)
