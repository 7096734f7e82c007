"""Lazy layers, which learn their shapes from the first batch that they are given."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import inference_mode, nn, no_grad
from torch.nn.parameter import is_lazy

from tdhook.models.entries import dense_copy
from tdhook.models.holding import modules_of
from tdhook.models.model import Model
from tdhook.models.snapshots import Snapshot
from tdhook.models.state import restored, slots_of
from tdhook.models.turns import here
from tdhook.tape.undoing import Hook, Undoing, hooked

__all__ = ["initialise", "is_unmade"]


def is_unmade(root: nn.Module) -> bool:
    """Whether a model has parameters or buffers whose shapes are not known yet."""
    return any(map(_has_lazy, modules_of(root).values()))


def initialise(model: Model, td: TensorDictBase) -> None:
    """Make the lazy layers of a model, as its first call would.

    The model is run once. Afterwards it is as it was when the last of its lazy layers was made, random numbers
    included, so that its first call of its own begins there.

    Args:
        model: the model.
        td: what it is called with.
    """
    modules = modules_of(model.root).values()
    waiting = {id(module): module for module in modules if _has_lazy(module)}
    made: list[Snapshot] = []

    def note(module: nn.Module, *args: object) -> None:
        # Parameters that are kept elsewhere, as multi-agent networks do, are made inside the module that uses them.
        for one in [one for one in waiting.values() if not _has_lazy(one)]:
            del waiting[id(one)]
            made.append(Snapshot((one,), alone=True))

    # Behind torch's own hooks, which make the parameters.
    hooks: list[Hook] = [(module.register_forward_pre_hook, here(note), {}) for module in waiting.values()]
    hooks += [(module.register_forward_hook, here(note), {}) for module in modules]
    with Undoing():
        with hooked(*hooks), inference_mode(False), no_grad(), restored(model.root):
            model.tried(dense_copy(td))
        for snapshot in made:
            snapshot.put_back()


def _has_lazy(module: nn.Module) -> bool:
    return any(is_lazy(registry[name]) for registry, name in slots_of((module,)))
