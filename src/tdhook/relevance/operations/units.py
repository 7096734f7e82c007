"""Units: modules that have a rule run as one, in a pass that is watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook.models.paths import Paths
from tdhook.relevance.operations.norms import Norms
from tdhook.relevance.operations.overwriters import Overwriters
from tdhook.relevance.operations.parties import GIVES_OUT_LATER, Entered, Observer
from tdhook.relevance.propagation.binding import Binding, Bound
from tdhook.relevance.propagation.call import ALONE, Call, Setting
from tdhook.relevance.propagation.entering import no_operation
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.inherited import LINEAR, inherited_operation
from tdhook.tape.compiling import refuse_compiling
from tdhook.tape.dependence import Dependence
from tdhook.tape.internals import (
    function_modes,
    pop_mode,
    push_mode,
    sees,
    set_function_modes,
    storage_of,
    top_mode,
)
from tdhook.tape.modes import Watching
from tdhook.tape.overwriting import Guard, Memory, Outdated
from tdhook.tape.trees import hides_tensors, tree_leaves

__all__ = ["Units"]


class Units(Watching):
    """Runs the modules that have a rule, and knows what of the model runs right now.

    Args:
        modules: the model's modules by path.
        norms: finds the batch norms that calls of a function amount to.
        setting: what the calls of the plan share.

    Attributes:
        dependence: what depends on the inputs.
        guard: keeps what is overwritten, ``outdated`` tells of what should have been, ``detached`` of what was handed
            out off the tape, and ``uncounted`` of what may be overwritten without torch's noticing.
        observer: makes the calls itself, while there is one.
    """

    def __init__(self, modules: Mapping[str, nn.Module], norms: Norms, setting: Setting = ALONE) -> None:
        super().__init__()
        self.setting = setting
        self.paths = Paths(modules)
        self.norms = norms
        self.dependence = Dependence()
        self.guard = Guard()
        self.outdated = Outdated(self.guard)
        self.detached, self.uncounted = Memory(), Memory()
        self.observer: Observer | None = None
        self._overwriters = Overwriters(self.guard, self.outdated)
        self._entered: Entered | None = None
        self._paused = 0
        self._outer: list[list[TorchFunctionMode]] = []
        if setting.reference is not None:
            setting.reference.path = self._place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observer": None, "_outer": []}

    def __enter__(self) -> Units:
        refuse_compiling()
        self._outer.append(function_modes())
        push_mode(self)
        return self

    def __exit__(self, *exception: object) -> None:
        # Not merely the uppermost one off: where this is interrupted, it need not be this one. What an interrupt left
        # behind is closed whenever it is collected, and was put back long before.
        if self._outer:
            set_function_modes(self._outer.pop())

    @property
    def aside(self) -> bool:
        """Whether what runs right now belongs to a rule, and not to the model."""
        return self._paused > 0

    def _is_followed(self, x: Tensor, *, shifts: bool = False) -> bool:
        """Whether derivatives of a value are followed right now: its operations are seen, or a rule asks for them."""
        return not self._paused or self._overwriters.hides(x, shifts=shifts)

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

    def unit(self, binding: Binding, call: Call, within: bool = False) -> Any:
        """Run a module that has a rule, and leave alone the operations inside it.

        Args:
            binding: the module under its rule.
            call: the call.
            within: whether it is made while an operation is looked at.
        """
        # What is asked of tensors here would be seen as well. Layers of torch overwrite nothing (they run out of
        # place), so that there is nothing to see in them.
        aside = top_mode() is self
        if aside:
            pop_mode()
        elif not (within or sees(self)):
            return call.execute()  # what an autograd function runs, in its forward pass or once more
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
            result = self._overwriters.run(call.module, call, partial(self._observed, binding.bound))
            if not isinstance(result, Tensor):
                self._require_seen(call.module, result)
            return result
        finally:
            self._paused -= 1

    def _require_seen(self, module: nn.Module, result: object) -> None:
        hidden = next(filter(hides_tensors, tree_leaves(result)), None)
        if hidden is not None:
            path = next(path for path, known in self.paths.modules.items() if known is module)
            kinds = type(module).__name__, type(hidden).__name__
            raise NotImplementedError(GIVES_OUT_LATER.format(path or "(model)", *kinds))

    def _observed(self, bound: Bound, call: Call) -> Any:
        if self.observer is None:
            return bound.run(call)
        if self._paused == 1:
            return self.observer.call(self.paths.current, None, bound, call)
        return bound.run(self.observer.inside(call))

    def _enter(self, binding: Binding, call: Call) -> Any:
        """Run a layer with its rule on the operation inside it that is meant, one that its weights reach say."""
        rule, name = cast(PropagationRule, binding.rule), inherited_operation(call.module) or LINEAR
        before, self._entered = self._entered, Entered(rule, name)
        try:
            result = call.natively()
            if not self._entered.found and rule.requires_operation:
                raise NotImplementedError(no_operation(call.module, rule, name))
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

    def _normalise(self, norm: Binding, func: Any, args: Any) -> Any:
        """Run a batch norm as the layer of torch's that it amounts to."""
        x, *others = args
        module = cast(nn.BatchNorm2d, norm.module)
        module.training, module.eps = others[4], others[6]
        call = Call(module, lambda x: func(x, *others), (x,), {}, self.setting)
        return self.unit(norm, call, within=True)
