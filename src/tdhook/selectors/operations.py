"""The selector of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tdhook.models.sites import Site
from tdhook.selectors.base import Selector, names_in, reads_data
from tdhook.selectors.names import name_of

__all__ = ["Op"]


@dataclass(frozen=True, init=False)
class Op(Selector):
    """Operations: torch functions that the forward pass calls outside of any module that has a rule itself.

    Functions, methods, operators, in-place and ``out=`` forms are one operation. Together with other selectors, those
    are about the module around it: ``Op(torch.add) & Name("*.layers.*")``.

    Args:
        operations: torch functions (``torch.add``, ``F.softmax``, ``operator.matmul``), or names or globs of names
            (``"softmax"``, ``"*pool2d"``).
    """

    operations: tuple[str, ...]

    def __init__(self, *operations: str | Callable[..., object]) -> None:
        if not operations or not all(isinstance(o, str) or callable(o) for o in operations):
            raise TypeError(f"Op takes torch functions or names of operations, got {operations!r}")
        for operation in operations:
            if isinstance(operation, type):
                raise TypeError(
                    f"Op selects functions; write Type({operation.__name__}) for modules of a class"
                )
        object.__setattr__(self, "operations", tuple(map(name_of, operations)))

    @property
    def reaches_operations(self) -> bool:
        return True

    def matches(self, site: Site) -> bool:
        name = site.operation
        return name is not None and any(fnmatchcase(name, o) for o in self.operations)

    def to_dict(self) -> dict[str, object]:
        return {"op": list(self.operations)}

    def __repr__(self) -> str:
        return f"Op({', '.join(map(repr, self.operations))})"


reads_data("op")(lambda value: Op(*names_in(value)))
