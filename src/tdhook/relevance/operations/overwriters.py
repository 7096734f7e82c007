"""Overwriters: modules and autograd functions that run as one, and overwrite what they are given without a word.

What a rule keeps of their arguments would be what they left there, and each run that a rule or the ledger makes would
overwrite it again. So they run on copies, and what they wrote is written back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.call import Call, Run
from tdhook.tape.containers import leaving_containers
from tdhook.tape.functions import copy_of, may_look_at
from tdhook.tape.internals import storage_of
from tdhook.tape.overwriting import Guard, Mutated, Outdated, version_in
from tdhook.tape.trees import tree_leaves, tree_map_tensors

__all__ = ["Overwriters"]


class Overwriters:
    """Tells which they are, and runs them.

    Args:
        guard: copies what the backward pass keeps of what is overwritten.
        outdated: is told of arguments that were overwritten.

    Attributes:
        given: the arguments of the one of which a rule wants derivatives right now, ``None`` where there is none.
        watched: the one that is looked at right now, if there is one.
    """

    def __init__(self, guard: Guard, outdated: Outdated) -> None:
        self._guard, self._outdated = guard, outdated
        self.given: list[Tensor] | None = None
        self.watched: _Watched | None = None
        self._known: set[int] = set()
        self._looked_at: set[int] = set()
        self._uncounted: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        forgotten = {"_known": set[int](), "_looked_at": set[int](), "_uncounted": set[int]()}
        return {**self.__dict__, "watched": None, **forgotten}

    def run(self, which: object, call: Call, run: Run) -> Any:
        """Make a call.

        Args:
            which: the module or the autograd function that is called.
            call: the call.
            run: makes it under its rule.

        Raises:
            Mutated: it has overwritten an argument, which was not known; the model is to be run again.
        """
        if id(which) in self._known:
            return self._on_copies(which, call, run)

        def seen(counted: bool) -> None:
            self._known.add(id(which))
            if not counted:
                self._uncounted.add(id(which))
            self._guard.active = True
            raise Mutated

        looks = isinstance(which, nn.Module) and id(which) not in self._looked_at
        self._looked_at.add(id(which))
        function = call.function
        if isinstance(which, nn.Module):
            function = leaving_containers(function, type(which).__name__)
        return self._made(_Watched(self, function, seen, looks), call, run)

    def _made(self, function: Callable[..., Any], call: Call, run: Run) -> Any:
        before = self.given, self.watched
        try:
            return run(_calling(function, call))
        finally:
            self.given, self.watched = before

    def hides(self, x: Tensor, *, shifts: bool = False) -> bool:
        """Whether derivatives miss what is written to a value.

        Args:
            x: the value.
            shifts: whether numbers are added to it, with which arguments have the derivative that they had.
        """
        given = self.given
        return given is not None and not (shifts and storage_of(x) in map(storage_of, given))

    def expose(self) -> None:
        """Look from now on at what becomes of arguments: memory is handed out, and torch counts no writing there."""
        if self.watched is not None:
            self.watched.look()

    @staticmethod
    def wrote_unseen(call: Call, run: Run) -> tuple[Any, bool]:
        """Make a call, and see whether it has overwritten an argument in such a way that torch does not count it."""
        before = _Values(_tensors(call.args, call.kwargs))
        result = run(call)
        return result, before.were_overwritten

    def _on_copies(self, which: object, call: Call, run: Run) -> Any:
        uncounted = id(which) in self._uncounted
        function = _OnCopies(self, call.function)
        result = self._made(function, call, run)
        given = _tensors(call.args, call.kwargs) if function.copies else []
        for x, copy, version in zip(given, function.copies, function.versions, strict=True):
            if version_in(copy) == version and not (uncounted and _differs(copy.detach(), x.detach())):
                continue
            kind = which if isinstance(which, type) else type(which)
            if function.followed and version_in(copy) == version:
                raise NotImplementedError(_UNSEEN.format(kind.__name__))
            self._guard.before(x)
            if copy is function.returned:  # who reads the argument from now on reads the result
                result = x.copy_(result)
            else:
                x.detach().copy_(copy.detach())
                self._outdated.hide(x, _READ.format(kind.__name__))
        return result


_READ = (
    "`{}` runs as one and overwrites an argument, which is read afterwards: no rule can follow what was written there; "
    "have it return that, or write to a new tensor"
)
_UNSEEN = (
    "`{}` runs as one and overwrites an argument where no derivative sees it (through numpy, say), while its rule asks "
    "for derivatives, so that it cannot follow; have it write to a new tensor"
)


class _Values:
    """The values of tensors, to see whether they are overwritten in such a way that torch does not count it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._given = [
            (x, x.detach().clone(), version_in(x))
            for x in tensors
            if x.layout is torch.strided and may_look_at(x)
        ]

    @property
    def were_overwritten(self) -> bool:
        """Whether they were."""
        return any(
            version_in(x) == version and _differs(x.detach(), before) for x, before, version in self._given
        )


class _Watched:
    """A function that is looked at, the first time that it runs, whether it overwrites what it is given.

    Args:
        overwriters: is told what it is given, if derivatives are wanted of it.
        function: the function.
        seen: told that it does, and whether torch counts that.
        looks: whether values are looked at for what torch does not count.
    """

    def __init__(
        self,
        overwriters: Overwriters,
        function: Callable[..., Any],
        seen: Callable[[bool], None],
        looks: bool,
    ) -> None:
        self._overwriters, self._function, self._seen, self._looks = overwriters, function, seen, looks
        self._given: list[Tensor] = []
        self._before: _Values | None = None
        self._ran = False

    def look(self) -> None:
        """Keep the values of what it is given, to see whether they are overwritten."""
        if self._before is None:
            self._before = _Values(self._given)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call it."""
        given = _tensors(args, kwargs)
        self._overwriters.given = given if torch.is_grad_enabled() else None
        if self._ran:
            return self._function(*args, **kwargs)
        self._ran, self._given, self._overwriters.watched = True, given, self
        versions = list(map(version_in, given))
        if self._looks:
            self.look()
        result = self._function(*args, **kwargs)
        self._overwriters.watched, self._given = None, []
        if versions != list(map(version_in, given)):
            self._seen(True)
        if self._before is not None and self._before.were_overwritten:
            self._seen(False)
        return result


class _OnCopies:
    """A function on copies of what it is given.

    Attributes:
        copies: those of the first time that it runs, and ``versions``: theirs before.
        returned: what it returned then.
        followed: whether a rule asked for derivatives.
    """

    def __init__(self, overwriters: Overwriters, function: Callable[..., Any]) -> None:
        self._overwriters, self._function = overwriters, function
        self.copies: list[Tensor] = []
        self.versions: list[int] = []
        self.returned: object = None
        self.followed = False

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call it."""
        args, kwargs = tree_map_tensors(_copied, (args, kwargs))
        copies = _tensors(args, kwargs)
        self.followed = torch.is_grad_enabled()
        self._overwriters.given = copies if self.followed else None
        versions = list(map(version_in, copies))
        result = self._function(*args, **kwargs)
        if not self.copies:
            self.copies, self.versions, self.returned = copies, versions, result
        return result


def _differs(x: Tensor, before: Tensor) -> bool:
    """Whether values are others, where memory that nobody has written to may hold no numbers."""
    return bool(((x != before) & ((x == x) | (before == before))).any())


def _calling(function: Callable[..., Any], call: Call) -> Call:
    return Call(call.module, function, call.args, call.kwargs, call.setting)


def _tensors(args: object, kwargs: object) -> list[Tensor]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def _copied(x: Tensor) -> Tensor:
    return x if isinstance(x, nn.Parameter) else copy_of(x)
