"""Two tools that most rules share: the stabiliser, and the replacement of parameters for a while.

The stabiliser keeps a denominator away from zero: ``stab(z) = z + eps * sign(z)`` with ``sign(0) = +1``. Every argument
named ``epsilon`` or ``stabilizer`` in this library is either that ``eps`` (a float) or a callable that maps a
denominator to its stabilised value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from tdhook.tape.internals import parameters_of
from tdhook.tape.undoing import undone

__all__ = ["ParamModifier", "ZeroParams", "require_parameters", "zero_param_names"]


ZeroParams: TypeAlias = "str | Iterable[str] | None"
ModifyFn: TypeAlias = Callable[[str, Tensor], Tensor]
SelectFn: TypeAlias = Callable[[str, Tensor], bool]


def zero_param_names(zero_params: ZeroParams) -> tuple[str, ...]:
    """Normalise the ``zero_params`` argument of a rule: a name, several, or none."""
    if zero_params is None:
        return ()
    if isinstance(zero_params, str) or not isinstance(zero_params, Iterable):
        zero_params = [zero_params]
    names = tuple(zero_params)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"zero_params takes names of parameters such as 'bias', got {name!r} of type {type(name).__name__}"
            )
    return names


def require_parameters(names: Iterable[str], modules: Iterable[nn.Module]) -> None:
    """Raise where no module has a parameter of a name.

    ``"weight"`` and ``"bias"`` are what the parameters of operations are called, and what a layer may have or not.

    Raises:
        ValueError: one of ``names`` is none of theirs.
    """
    own = {key for module in modules for layer in module.modules() for key in parameters_of(layer)}
    known = {"weight", "bias"} | own
    for name in names:
        if name not in known:
            raise ValueError(
                f"zero_params names {name!r}, and no layer under that rule has a parameter of that name; give one or "
                f"several of {', '.join(map(repr, sorted(known)))}"
            )


class ParamModifier:
    """Replaces parameters of a module while a ``with`` block runs.

    Args:
        modify_fn: ``(name, parameter) -> tensor`` gives the replacement; by default the parameter itself.
        select_fn: ``(name, parameter) -> bool`` says which parameters are replaced; by default none.

    Calling the modifier on a module is the context manager. Afterwards the very same parameter objects are back, also
    where the block raised. Names are dotted paths below the module, as in ``module.named_parameters()``.
    """

    def __init__(self, modify_fn: ModifyFn | None = None, select_fn: SelectFn | None = None) -> None:
        self.modify_fn: ModifyFn = modify_fn or (lambda name, param: param)
        self.select_fn: SelectFn = select_fn or (lambda name, param: False)

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield ``module`` with the selected parameters replaced."""
        originals: list[tuple[dict[str, object], str, nn.Parameter]] = []

        def put_back() -> None:
            for parameters, key, param in reversed(originals):
                parameters[key] = param

        with undone(put_back):
            for prefix, owner in list(module.named_modules()):
                for key, param in list(parameters_of(owner).items()):
                    name = f"{prefix}.{key}" if prefix else key
                    if param is None or not self.select_fn(name, param):
                        continue
                    replacement = self.modify_fn(name, param)
                    registry: dict[str, Any] = parameters_of(owner)
                    originals.append((registry, key, param))
                    registry[key] = replacement
            yield module

    @staticmethod
    def from_modifiers(modifiers: Sequence[ParamModifier]) -> ParamModifier:
        """Chain modifiers: each one that selects a parameter modifies what the ones before it left."""
        chain = tuple(modifiers)

        def select(name: str, param: Tensor) -> bool:
            return any(modifier.select_fn(name, param) for modifier in chain)

        def modify(name: str, param: Tensor) -> Tensor:
            for modifier in chain:
                if modifier.select_fn(name, param):
                    param = modifier.modify_fn(name, param)
            return param

        return ParamModifier(modify_fn=modify, select_fn=select)

    @staticmethod
    def select_all(name: str, param: Tensor) -> bool:
        """Select every parameter: a ``select_fn``."""
        return True
