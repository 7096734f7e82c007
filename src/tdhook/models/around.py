"""Around a model: a TensorDictModule that runs it in another way, under the names of its own modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdhook.models.entries import is_batch
from tdhook.models.holding import Beside
from tdhook.models.model import Model
from tdhook.tape.internals import buffers_of, children_of, parameters_of

__all__ = ["AroundModel"]


class AroundModel(TensorDictModuleBase):
    """Runs a model in another way, and leaves it as it is.

    Parameters, buffers and modules are the model's own, under the same names, so that what names a module of the model
    by its path names it here.

    Args:
        model: the model.
        beside: further modules, by path; in the state dict their names begin with ``"beside."``.

    Attributes:
        around: the model.
    """

    around: Model

    def __init__(self, model: Model, beside: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        root = model.root
        self._had = dict(children_of(root))
        modules = dict(self._had)
        if beside:
            modules[self._free("beside")] = Beside(beside)
        self.__dict__.update(
            # Not registered: its modules are under their own names. But it is a part of what is run.
            _around=root,
            around=model,
            _parameters=parameters_of(root),
            _buffers=buffers_of(root),
            _modules=modules,
            _non_persistent_buffers_set=root._non_persistent_buffers_set,
            training=root.training,
        )
        self.in_keys, self.out_keys = list(model.runner.in_keys), list(model.runner.out_keys)

    def _free(self, name: str) -> str:
        """A name that no module of the model has."""
        found, number = name, 0
        while found in self._had:
            number += 1
            found = f"{name}_{number}"
        return found

    def __setattr__(self, name: str, value: object) -> None:
        """Set the mode of the model, too."""
        super().__setattr__(name, value)
        if name == "training" and "_around" in self.__dict__:
            self._around.training = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "around" not in self.__dict__:
                raise
            return getattr(self.__dict__["around"].runner, name)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the model, and write what it writes.

        Raises:
            TypeError: there is no TensorDict.
            RuntimeError: the model has other modules now.
        """
        if not is_batch(tensordict):
            raise TypeError(
                f"{type(self).__name__} is called with a TensorDict that has {self.in_keys}, got "
                f"{type(tensordict).__name__}"
            )
        if dict(children_of(self.around.root)) != self._had:
            raise RuntimeError(
                f"modules of {type(self.around.root).__name__} were put in the place of others after "
                f"{type(self).__name__} was made of it: make it again"
            )
        return self.run(tensordict)

    @abstractmethod
    def run(self, td: TensorDictBase) -> TensorDictBase:
        """Run the model on a TensorDict."""
