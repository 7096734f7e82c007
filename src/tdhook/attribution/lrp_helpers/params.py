"""Two tools that most rules share: the stabiliser, and the replacement of parameters for a while.

The stabiliser keeps a denominator away from zero: ``stab(z) = z + eps * sign(z)`` with ``sign(0) = +1``. Every argument
named ``epsilon`` or ``stabilizer`` in this library is either that ``eps`` (a float) or a callable that maps a
denominator to its stabilised value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = [
    "ParamModifier",
    "Stabilizer",
    "ZeroParams",
    "checked",
    "exact",
    "moved_away",
    "rounding",
    "stabilize",
    "zero_param_names",
]

Stabilizer: TypeAlias = "float | Callable[[Tensor], Tensor]"
ZeroParams: TypeAlias = "str | Iterable[str] | None"
ModifyFn: TypeAlias = Callable[[str, Tensor], Tensor]
SelectFn: TypeAlias = Callable[[str, Tensor], bool]


# bfloat16 has the exponents of float32: small numbers are as exact as large ones. Others, float16 among them: 1e-3.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}


def stabilize(tensor: Tensor, epsilon: Stabilizer = 1e-6) -> Tensor:
    """Move a denominator away from zero.

    Args:
        tensor: any shape.
        epsilon: distance to add in the direction of the sign (zero counts as positive), or a callable
            ``denominator -> stabilised denominator``.

    Returns:
        ``tensor + epsilon * sign(tensor)``, same shape and dtype.
    """
    return epsilon(tensor) if callable(epsilon) else _moved(tensor, epsilon)


def _moved(tensor: Tensor, epsilon: float) -> Tensor:
    # Negative zero is zero: adding zero makes it positive.
    return torch.copysign(_distance(tensor, epsilon), tensor + 0.0).add_(tensor)


def moved_away(tensor: Tensor, epsilon: float) -> Tensor:
    """:func:`stabilize` where it does not matter which way a negative zero is moved."""
    return torch.copysign(_distance(tensor, epsilon), tensor).add_(tensor)


def _distance(tensor: Tensor, epsilon: float) -> Tensor:
    dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    if torch.compiler.is_compiling():
        return torch.full((), epsilon, dtype=dtype, device=tensor.device)
    return _number(epsilon, dtype, tensor.device)


@lru_cache
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def rounding(tensor: Tensor) -> Tensor:
    """The stabiliser for what must not show: by precision (float64 1e-12, float32 and bfloat16 1e-6, else 1e-3)."""
    return _moved(tensor, _ROUNDING.get(tensor.dtype, 1e-3))


def exact(tensor: Tensor) -> Tensor:
    """The stabiliser that changes nothing: a denominator of zero gives a share of zero."""
    return torch.where(tensor == 0, torch.inf, tensor)


def checked(epsilon: Stabilizer, name: str = "stabilizer") -> Stabilizer:
    """The argument of a rule, if it can stabilise.

    Raises:
        TypeError: it is neither a number nor a callable.
        ValueError: it is negative.
    """
    if callable(epsilon):
        return epsilon
    if type(epsilon) not in (int, float):
        raise TypeError(f"{name} is a float or a callable on the denominator, got {epsilon!r}")
    if epsilon < 0:
        raise ValueError(f"{name} moves denominators away from zero, so it is not negative, got {epsilon!r}")
    return epsilon


def zero_param_names(zero_params: ZeroParams) -> tuple[str, ...]:
    """Normalise the ``zero_params`` argument of a rule: a name, several, or none."""
    if zero_params is None:
        return ()
    names = (zero_params,) if isinstance(zero_params, str) else tuple(zero_params)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"zero_params takes names of parameters such as 'bias', got {name!r} of type {type(name).__name__}"
            )
    return names


class ParamModifier:
    """Replaces parameters of a module while a ``with`` block runs.

    Args:
        modify_fn: ``(name, parameter) -> tensor`` gives the replacement; by default the parameter itself.
        select_fn: ``(name, parameter) -> bool`` says which parameters are replaced; by default none.

    Calling the modifier on a module is the context manager. Afterwards the very same parameter objects are back, also
    where the block raised. Names are dotted paths below the module, as in ``module.named_parameters()``.
    """

    def __init__(self, modify_fn: ModifyFn | None = None, select_fn: SelectFn | None = None) -> None:
        self._modify_fn: ModifyFn = modify_fn or (lambda name, param: param)
        self._select_fn: SelectFn = select_fn or (lambda name, param: False)

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield ``module`` with the selected parameters replaced."""
        originals: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        try:
            for prefix, owner in list(module.named_modules()):
                for key, param in list(owner._parameters.items()):
                    name = f"{prefix}.{key}" if prefix else key
                    if param is None or not self._select_fn(name, param):
                        continue
                    replacement = self._modify_fn(name, param)
                    originals.append((owner._parameters, key, param))
                    owner._parameters[key] = replacement
            yield module
        finally:
            for parameters, key, param in reversed(originals):
                parameters[key] = param

    @staticmethod
    def from_modifiers(modifiers: Sequence[ParamModifier]) -> ParamModifier:
        """Chain modifiers: each one that selects a parameter modifies what the ones before it left."""
        chain = tuple(modifiers)

        def select(name: str, param: Tensor) -> bool:
            return any(modifier._select_fn(name, param) for modifier in chain)

        def modify(name: str, param: Tensor) -> Tensor:
            for modifier in chain:
                if modifier._select_fn(name, param):
                    param = modifier._modify_fn(name, param)
            return param

        return ParamModifier(modify_fn=modify, select_fn=select)

    @staticmethod
    def select_all(name: str, param: Tensor) -> bool:
        """Select every parameter: a ``select_fn``."""
        return True
