"""Runs every operation of a forward pass under its rule."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tdhook.conventions import Convention
from tdhook.models.paths import Paths
from tdhook.relevance.operations.applied import Applied, is_ours
from tdhook.relevance.operations.asking import Asking
from tdhook.relevance.operations.in_place import overwritten, writing
from tdhook.relevance.operations.kernels import first_output, of_a_kernel, positional
from tdhook.relevance.operations.known import Known, learned, on_a_copy
from tdhook.relevance.operations.overwriters import Overwriters
from tdhook.relevance.operations.parties import (
    COMPILED,
    DIFFERENTIATES,
    HIDDEN,
    NO_DERIVATIVE,
    OVERWRITES,
    TRANSFORMS,
    Entered,
    Found,
    Observer,
    Unmatched,
)
from tdhook.relevance.operations.readings import DIFFERENCES, VALUES
from tdhook.relevance.operations.stand_ins import standing_in, while_alive
from tdhook.relevance.operations.table import ARITHMETIC
from tdhook.relevance.operations.watched import Pass
from tdhook.relevance.operations.written_out import in_parts
from tdhook.relevance.propagation.again import Again
from tdhook.relevance.propagation.binding import Binding, Bound
from tdhook.relevance.propagation.call import ALONE, Call, Run, Setting
from tdhook.relevance.propagation.entering import is_linear, no_operation
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.rules.simple import IgnoreRule
from tdhook.selectors.names import relabels, writes_in_place
from tdhook.tape.compiling import refuse_compiling
from tdhook.tape.dependence import Dependence
from tdhook.tape.entering import entered
from tdhook.tape.internals import (
    APPLIED_IN_TRANSFORMS,
    autocasting,
    function_modes,
    is_without_derivative,
    pop_mode,
    push_mode,
    sees,
    set_function_modes,
    storage_of,
    through_transforms,
    top_mode,
    transformed,
)
from tdhook.tape.modes import ONLY_TENSORS, Watching, answered, beneath
from tdhook.tape.overwriting import Guard, Memory, Outdated
from tdhook.tape.sharded import moves_between_processes
from tdhook.tape.sparse import Live, at_fault
from tdhook.tape.trees import tree_leaves

__all__ = ["Interception"]


_NATIVE = IgnoreRule()
# What functions of torch take by the names of numpy as well.
_NAMES = {"axis": "dim", "keepdims": "keepdim"}


class Interception(Watching):
    """While active, runs each torch function on the tape under the rule of its operation.

    Args:
        flow: the convention of the backward pass.
        modules: the model's modules by path.
        asking: asks a composite.
        defaults: whether what the composite leaves open has the rule of its operation in
            :mod:`~tdhook.relevance.operations.table`.
        unmatched: told ``(operation, path)`` of operations that nothing is known of.
        setting: what the calls of the plan share.

    Attributes:
        norms: the rules of batch norms inside layers that derive from one, by the id of the running mean.
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
    ) -> None:
        super().__init__()
        self.setting = setting
        self.flow = flow
        self.guard = Guard()
        self.outdated = Outdated(self.guard)
        self.detached = Memory()
        self._overwriters = Overwriters(self.guard)
        self.observer: Observer | None = None
        self.asking, self._defaults, self._unmatched = asking, defaults, unmatched
        self._known: dict[object, Known] = {}
        self._functions: WeakKeyDictionary[type, Known] = WeakKeyDictionary()
        self._paused = 0
        self._entered: Entered | None = None
        self.paths = Paths(modules)
        self.norms: dict[int, Binding] = {}
        self._reading = VALUES
        if setting.reference is not None:
            self._reading = DIFFERENCES
            setting.reference.path = self._place
        self._outer: list[list[TorchFunctionMode]] = []
        self.dependence = Dependence()
        while_alive(self)

    def __getstate__(self) -> dict[str, Any]:
        # What is known of torch functions is found again; they cannot all be pickled.
        return {
            **self.__dict__,
            "_known": {},
            "_functions": None,
            "norms": {},
            "observer": None,
            "_outer": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _functions=WeakKeyDictionary())
        while_alive(self)

    def __enter__(self) -> Interception:
        refuse_compiling()
        self._outer.append(function_modes())
        push_mode(self)
        return self

    def __exit__(self, *exception: object) -> None:
        # Not merely the uppermost one off: where this is interrupted, it need not be this one. What an interrupt left
        # behind is closed whenever it is collected, and was put back long before.
        if self._outer:
            set_function_modes(self._outer.pop())

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

    @property
    def aside(self) -> bool:
        """Whether what runs right now belongs to a rule, and not to the model."""
        return self._paused > 0

    def _place(self) -> str:
        return self.paths.current if self.paths.following else ""

    def resting(self) -> Callable[[], None]:
        """Make it again what it is now, between calls, or around one that is made within another."""
        paths = self.paths
        observer, paused, around, following = self.observer, self._paused, paths.around, paths.following
        entered, dependence, depth = self._entered, self.dependence, len(self._outer)

        def put_back() -> None:
            self.observer, self._paused = observer, paused
            paths.around, paths.following = around, following
            self._entered, self.dependence = entered, dependence
            del self._outer[depth:]

        return put_back

    def look_for_kept(self) -> None:
        """See whether a module keeps what should have been overwritten."""
        for module in self.paths.modules.values():
            self.outdated.check(list(vars(module).values()), kept=True)

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
                nullcontext() if self.setting.reference is None else self.setting.reference.aside(),
                standing_in(self),
                self,
            ):
                yield
        finally:
            self.dependence = before

    def unit(self, binding: Binding, call: Call) -> Any:
        """Run a module that has a rule, and leave alone the operations inside it."""
        # What is asked of tensors here would be seen as well. Layers of torch overwrite nothing (they run out of
        # place), so that there is nothing to see in them.
        aside = top_mode() is self
        if aside:
            pop_mode()
        try:
            live, foreign = self.dependence.look_at_call(call.args, call.kwargs)
            if foreign:
                args, kwargs = self.dependence.constants_off((call.args, call.kwargs), own=live)
                call = call.given(args, kwargs)
            if self.outdated.any:
                self.outdated.check((*call.args, *call.kwargs.values()) if call.kwargs else call.args)
            if aside and not (live and binding.closed):
                aside = False
                push_mode(self)
            if not live:
                result = call.execute()
            elif binding.closed and self.observer is None and not binding.enters:
                self._paused += 1
                try:
                    result = binding.bound.run(call)
                finally:
                    self._paused -= 1
            else:
                result = self._run_unit(binding, call)
        finally:
            if aside:
                push_mode(self)
        return self._as_in_place(call.module, call.args, result) if self.outdated.layers else result

    def _run_unit(self, binding: Binding, call: Call) -> Any:
        """Run a module in sight of the observer, or in parts if that is how it is ruled."""
        if binding.enters and not self._paused:
            return self._enter(binding, call)
        self._paused += 1
        try:
            if binding.closed:
                return self._observed(binding.bound, call)
            return self._overwriters.run(call.module, call, partial(self._observed, binding.bound))
        finally:
            self._paused -= 1

    def _observed(self, bound: Bound, call: Call) -> Any:
        if self.observer is None:
            return bound.run(call)
        if self._paused == 1:
            return self.observer.call(self.paths.current, None, bound, call)
        return bound.run(self.observer.inside(call))

    def _enter(self, binding: Binding, call: Call) -> Any:
        """Run a layer that makes its weights itself, with its rule on the linear operation that they reach."""
        before, self._entered = self._entered, Entered(cast(Rule, binding.rule))
        try:
            result = call.natively()
            if not self._entered.found:
                raise NotImplementedError(no_operation(call.module))
            return result
        finally:
            self._entered = before

    def _as_in_place(self, module: nn.Module, args: Any, result: Any) -> Any:
        """What a layer returns that overwrites its input, having been run out of place."""
        if id(module) not in self.outdated.layers or not args or not isinstance(args[0], Tensor):
            return result
        if not self.outdated.heeded:
            if not isinstance(result, Tensor) or storage_of(result) != storage_of(args[0]):
                self.outdated.add(args[0])
            return result
        self.guard.before(args[0])
        return args[0].copy_(result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and types != ONLY_TENSORS and not self._paused:
            found = answered(self, func, types, args, kwargs)
            if found is not NotImplemented:
                return found
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = self._learn(func)
        kwargs = kwargs or {}
        if known.aside:
            if known.begins_tape:
                self.dependence.look_closely(args[0])
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
            elif known.renames and ("axis" in kwargs or "keepdims" in kwargs):
                kwargs = {_NAMES.get(name, name): value for name, value in kwargs.items()}
        if self.outdated.any:
            self.outdated.check((*args, *kwargs.values()) if kwargs else args)
        in_place = known.in_place or (bool(kwargs) and writes_in_place(func, kwargs))
        if in_place and self.guard.active:
            self.guard.before(overwritten(args, kwargs))
        dependence = self.dependence
        if not torch.is_grad_enabled():
            if in_place and not self._paused:
                for x in tree_leaves(overwritten(args, kwargs)):
                    if isinstance(x, Tensor) and dependence.has(x):
                        self._hide(known, x)
            return func(*args, **kwargs)
        try:
            live, foreign = dependence.look(args)
            if kwargs:
                below = dependence.look(kwargs.values())
                live, foreign = live or below[0], foreign or below[1]
        except Live as error:
            raise Live(error.x, known.operation.name, self.paths.current) from None
        if not self._paused and dependence.is_hidden(args, kwargs):
            raise NotImplementedError(TRANSFORMS.format(self.paths.current or "(model)"))
        if known.detaches and live and (known.uncounted or not self._paused):
            self.detached.add(args[0])
        given, given_by_name = args, kwargs
        if foreign:
            args, kwargs = dependence.constants_off((args, kwargs), own=live and not self._paused)
            if live and isinstance(func, Applied):
                func = func.with_constants((given, given_by_name), (args, kwargs))
        if in_place:
            # What is overwritten stays the tensor that the model holds.
            target = overwritten(given, given_by_name)
            return self._in_place(known, func, args, kwargs, target, live)
        if (known.quick and self.observer is None and self._entered is None) or self._paused or not live:
            return func(*args, **kwargs)
        if known.refused:
            raise NotImplementedError(
                OVERWRITES.format(known.operation.name, self.paths.current or "(model)")
            )
        if func is APPLIED_IN_TRANSFORMS:
            # What it comes to outside of the transform is seen.
            if is_ours(args[0]):
                return func(*args, **kwargs)
            with self:
                return through_transforms(func, args, kwargs)
        if known.differentiates:
            raise NotImplementedError(DIFFERENTIATES.format(self.paths.current or "(model)"))
        if known.normalises and id(args[3]) in self.norms:
            return self._normalise(self.norms[id(args[3])], func, args)
        selector, rule = self._find(known, args, kwargs)
        return self._run(known, selector, rule, func, args, kwargs)

    def _normalise(self, norm: Binding, func: Any, args: Any) -> Any:
        """Run the batch norm inside a layer as the layer of torch's that it would be alone."""
        x, *others = args
        module = cast(nn.BatchNorm2d, norm.module)
        module.training, module.eps = others[4], others[6]
        return self.unit(norm, Call(module, lambda x: func(x, *others), (x,), {}, self.setting))

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
        selector, rule = self._find(known, args, kwargs)
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
        known = self._functions.get(func.function)
        if known is None:
            known = self._functions[func.function] = self._learn(func)
        self._known[func] = known
        try:
            with beneath(self):
                return self.__torch_function__(func, (), args, kwargs)
        finally:
            del self._known[func]

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

    def _learn(self, func: Any) -> Known:
        known = learned(func)
        name = known.operation.name
        self.asking.once(known, self.paths)
        if not known.in_place and not self.asking.by_path:
            default = known.own or self._reading.default(name, (), {}) if self._defaults else _NATIVE
            rule = default if known.rule is None else known.rule
            known.quick = rule is not None and rule.native
        return known

    def _find(self, known: Known, args: Any, kwargs: Any) -> Found:
        entered = self._entered
        if entered is not None and is_linear(known.operation, args, kwargs):
            entered.found = True
            return None, entered.rule
        self.asking.each(known, self.paths)
        if known.rule is not None:
            return known.selector, known.rule
        if not self._defaults:
            return None, _NATIVE
        return None, known.own or self._reading.default(known.operation.name, args, kwargs)

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
        operation = known.operation
        if rule is None:
            inside = self._reading.written_out(operation.name)
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
                raise NotImplementedError(
                    NO_DERIVATIVE.format(operation.name, self.paths.current or "(model)")
                )
            self._unmatched(operation.name, self.paths.current)
            selector = Unmatched()
            rule = ARITHMETIC
        bound = known.bound(rule, self.flow, self._reading)
        call = Call(operation, func, args, kwargs, self.setting)
        try:
            if self._reading.opens(rule):
                at_once = self._at_once(rule, call)
                if at_once is not None:
                    return at_once(call)
                with self:
                    return bound.run(call)
            run = bound.run
            if self.observer is not None:
                run = partial(self.observer.call, self.paths.current, selector, bound)
            return self._applied(func, call, run) if isinstance(func, Applied) else run(call)
        except RuntimeError as error:
            odd = at_fault(error, (args, kwargs))
            if odd is None:
                raise
            raise Live(odd, operation.name, self.paths.current) from error

    def _at_once(self, rule: Rule, call: Call) -> Run | None:
        """How a call is made without writing it out, if nobody asks for what is inside."""
        unseen = self.observer is None and self._entered is None and not self.asking.ordered
        if not (unseen and self._defaults) or transformed() or autocasting():
            return None
        ahead = self.asking.ahead(self.paths)

        def rule_of(operation: str, *args: Any) -> Rule | None:
            return ahead(operation) or self._reading.default(operation, args, {})

        return rule.at_once(call, self.flow, rule_of)
