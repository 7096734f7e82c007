"""Dictionaries spliced into a model: relevance at the features of a sparse autoencoder, or of any basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.concepts.splicing import Features, Place, Reconstruction
from tdhook.models.around import AroundModel
from tdhook.models.holding import modules_of
from tdhook.models.model import InKeys, Model
from tdhook.models.turns import Turn, here
from tdhook.tape.undoing import Hook, hooked

__all__ = ["Dictionary", "Spliced", "SplicedModel"]


@runtime_checkable
class Dictionary(Protocol):
    """What says a value in features: a sparse autoencoder, a basis."""

    @property
    def encode(self) -> Callable[[Tensor], Tensor]:
        """``[..., width] -> [..., features]``."""

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """``[..., features] -> [..., width]``, about what was encoded."""


Pair: TypeAlias = "tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]"


class Coder(nn.Module):
    """A dictionary of two functions, or modules."""

    def __init__(self, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.decode = encode, decode


class Spliced:
    """Puts dictionaries behind modules of a model, so that relevance passes their features.

    Behind each of the modules, ``h`` is replaced by ``decode(encode(h)) + error``, where ``error = h -
    decode(encode(h))`` is held constant. What goes on is ``h`` itself, so that the model answers as before, to the last
    bit; but gradients and relevance go through the dictionary. Relevance of the error is absorbed, for the reason
    ``"reconstruction"`` in the ledger.

    Features are the output of a module of the spliced model, ``"path.features"``: ``input_modules`` gives relevance
    for them, ``target_modules`` explains them, and what puts other values in their place gets ``h`` and what these
    values decode to differently. Their axis is where ``h`` has its width.

    Args:
        dictionaries: by path of the module behind which each is put: an object with ``encode`` and ``decode``, or a
            pair of functions or modules that do.
        axis: which axis of ``h`` is encoded, at each position along the others; for all, or by path. The whole batch
            counts as one leading axis, and negative ones count from the end. By default the only axis of the features.
        element: which element of what the module returns is ``h``, where that is a tuple or has keys; for all, or by
            path.

    Raises:
        TypeError: what is no dictionary.
        ValueError: there is none, or an axis that is the batch's.
    """

    def __init__(
        self,
        dictionaries: Mapping[str, Dictionary | Pair],
        *,
        axis: int | Mapping[str, int] | None = None,
        element: int | str | Mapping[str, int | str] | None = None,
    ) -> None:
        if not dictionaries:
            raise ValueError("Spliced takes at least one dictionary by the path of a module, and got none")
        self.dictionaries = {path: _as_dictionary(path, given) for path, given in dictionaries.items()}
        self.axis, self.element = axis, element
        for option, given in (("axis", axis), ("element", element)):
            if isinstance(given, Mapping) and (unknown := given.keys() - self.dictionaries.keys()):
                raise ValueError(
                    f"{option} names {', '.join(map(repr, sorted(unknown)))}, where there is no dictionary; there are "
                    f"dictionaries at {', '.join(map(repr, self.dictionaries))}"
                )
        for path in self.dictionaries:
            if self._of(path, axis) == 0:
                raise ValueError(
                    f"axis=0 of {path!r} is that of the batch: the first axis of the features is axis=1, the last is "
                    "axis=-1"
                )

    def __repr__(self) -> str:
        named = ", ".join(f"{path!r}: {type(one).__name__}" for path, one in self.dictionaries.items())
        return f"Spliced({{{named}}})"

    @staticmethod
    def _of(path: str, option: Any) -> Any:
        return option.get(path) if isinstance(option, Mapping) else option

    def on(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> SplicedModel:
        """The model with the dictionaries in it; the model itself is left as it is.

        Args:
            module: a TensorDictModule, or any module, which then reads ``"input"`` and writes ``"output"``.
            in_keys: keys that a plain module reads.
            out_keys: keys that a plain module writes.

        Raises:
            ValueError: the model has no module of a path, or has one where features would be.
        """
        model = Model.of(module, in_keys, out_keys)
        known = {id(part): name for name, part in modules_of(model.root).items()}
        places: list[Place] = []
        beside: dict[str, nn.Module] = {}
        for path, dictionary in self.dictionaries.items():
            host = model.submodule(path)
            name = known[id(host)]
            if any(place.host is host for place in places):
                raise ValueError(f"two dictionaries are at {path!r}, which is one module: name it once")
            axis, element = self._of(path, self.axis), self._of(path, self.element)
            features = Features(path, dictionary)
            place = Place(path, host, features, Reconstruction(path, dictionary), axis, element)
            places.append(place)
            for part, made in (("features", place.features), ("reconstruction", place.reconstruction)):
                below = f"{name}.{part}".strip(".")
                if below in known.values():
                    raise ValueError(f"the model has a module {below!r}, where what is spliced in would be")
                beside[below] = made
        return SplicedModel(model, places, beside)


class SplicedModel(AroundModel):
    """A model with dictionaries in it: what :meth:`Spliced.on` makes.

    Attributes:
        feature_modules: by the path of each dictionary, the module whose output are its features: a forward hook on it
            may put others in their place.
    """

    def __init__(self, model: Model, places: Sequence[Place], beside: Mapping[str, nn.Module]) -> None:
        super().__init__(model, beside)
        self._places = tuple(places)
        self.__dict__["feature_modules"] = {place.path: place.features for place in places}
        self._turn = Turn(modules_of(self).values())

    def run(self, td: TensorDictBase) -> TensorDictBase:
        """Run the model, with each value encoded and decoded on its way.

        Raises:
            RuntimeError: it calls one of the modules not at all.
        """
        met: set[str] = set()
        hooks: list[Hook] = [
            (place.host.register_forward_hook, here(place.hook(td.batch_size, met)), {})
            for place in self._places
        ]
        with self._turn, hooked(*hooks):
            found: TensorDictBase = self.around.runner(td)
        for place in self._places:
            if place.path not in met:
                raise RuntimeError(
                    f"the model did not call {place.path!r}, behind which there is a dictionary: splice it behind a "
                    "module that runs"
                )
        return found


def _as_dictionary(path: str, given: object) -> Dictionary:
    if isinstance(given, tuple) and len(given) == 2 and all(map(callable, given)):
        return Coder(*given)
    if callable(getattr(given, "encode", None)) and callable(getattr(given, "decode", None)):
        return given  # type: ignore[return-value]
    raise TypeError(
        f"the dictionary at {path!r} is {type(given).__name__}: give an object with encode and decode, or a pair of "
        "functions (encode, decode); a matrix of components as Basis(components)"
    )
