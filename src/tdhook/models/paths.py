"""Paths: inside which module of the model the forward pass is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import currentframe
from types import FrameType

from torch import nn

from tdhook.tape.internals import called

__all__ = ["Paths"]


class Paths:
    """Tells the innermost module that is running, from the calls that this thread is in the midst of.

    Nothing is put on a module or kept while it runs, so that other threads neither notice nor are noticed.

    Args:
        modules: the modules by dotted path.

    Attributes:
        following: whether a forward pass is being followed.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._names: dict[int, str] | None = None
        self.around: nn.Module | None = None
        self.following = False

    def __getstate__(self) -> dict[str, object]:
        # A copy has other modules, of other ids.
        return {**self.__dict__, "_names": None}

    @property
    def current(self) -> str:
        """Path of the innermost module that is running; ``""`` for the model itself."""
        return self.innermost[0]

    @property
    def innermost(self) -> tuple[str, nn.Module]:
        """Path and module of the innermost one that is running.

        One that the model does not hold, since it is made on the way say, is named by the module that called it.
        """
        if self._names is None:
            self._names = {id(module): path for path, module in self.modules.items()}
        found: nn.Module | None = None
        unknown: list[str] = []
        for module in _calls():
            if module is self.around:
                break
            path = self._names.get(id(module))
            found = module if found is None else found
            if path is not None:
                return ".".join([path, *reversed(unknown)]).lstrip("."), found
            unknown.append(f"({type(module).__name__})")
        return ".".join(reversed(unknown)), found or self.modules[""]

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow one forward pass."""
        self.around = next(_calls(), None)
        self.following = True
        try:
            yield
        finally:
            self.around, self.following = None, False


def _calls() -> Iterator[nn.Module]:
    """The modules whose calls this thread is in the midst of, the innermost first."""
    frame: FrameType | None = currentframe()
    while frame is not None:
        module = called(frame)
        if module is not None:
            yield module
        frame = frame.f_back
