"""Pairs: one encoder for two inputs."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn

from tdhook.keys import under
from tdhook.models.around import AroundModel
from tdhook.models.entries import is_batch
from tdhook.models.model import InKeys, Model

__all__ = ["Pair"]


class Pair(AroundModel):
    """One encoder, run on each of two TensorDicts inside another one.

    Parameters and modules are the encoder's own, under the same names; its modules are called twice.

    Args:
        encoder: a TensorDictModule that reads ``x`` and writes ``z``, say, or any module, which then reads ``"input"``
            and writes ``"output"``. The pair reads ``("a", x)`` and ``("b", x)``, and writes ``("a", z)`` and
            ``("b", z)``.
        names: ``("a", "b")``.
        in_keys: keys that a plain module reads.
        out_keys: keys that a plain module writes.

    Raises:
        ValueError: the names are not two.
    """

    def __init__(
        self,
        encoder: nn.Module,
        names: tuple[str, str] = ("a", "b"),
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(Model.of(encoder, in_keys, out_keys))
        if len(set(names)) != 2:
            raise ValueError(f"a pair has two names, got {names!r}")
        self.names = names
        self.in_keys = [under(name, key) for name in names for key in self.in_keys]
        self.out_keys = [under(name, key) for name in names for key in self.out_keys]

    def run(self, td: TensorDictBase) -> TensorDictBase:
        """Run the encoder on both.

        Raises:
            KeyError: one of them is missing.
        """
        for name in self.names:
            one = td.get(name, None)
            if not is_batch(one):
                raise KeyError(f"a pair is of two TensorDicts, under {self.names!r}: {name!r} is none")
            td.set(name, self.around.runner(one))
        return td
