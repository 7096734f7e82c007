"""Compiling: ``torch.compile`` is kept from what a pass is watched by.

A function that it made, inside a model, is traced anew where modes are on, and so is what these do: rules too. That
takes minutes, and what comes of it is not what the rules say.
"""

from __future__ import annotations

from tdhook.tape.internals import function_modes, told_when_compiling
from tdhook.tape.modes import Watching

__all__ = ["COMPILED_FUNCTION", "refuse_compiling"]

COMPILED_FUNCTION = (
    "the model calls `{}`, which torch.compile made and no rule sees into; explain it within "
    'torch.compiler.set_stance("force_eager"), in which it runs as the Python that it was written in, or give the '
    "model the function that was compiled"
)


def refuse_compiling() -> None:
    """From now on, raise where something is about to be compiled while a pass is watched in this thread."""
    told_when_compiling(_refuse)


def _refuse(name: str) -> None:
    if any(isinstance(mode, Watching) for mode in function_modes()):
        raise NotImplementedError(COMPILED_FUNCTION.format(name))
