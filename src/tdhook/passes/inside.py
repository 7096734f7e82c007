"""Inside: the layers of a model that relevance has to pass, by the place that a target names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor

from tdhook.models.capture import calls_of, module_path
from tdhook.models.model import Model
from tdhook.passes.performed import Output
from tdhook.tape.sharded import is_sharded, spread_of
from tdhook.targets.through import OfOperations, Place
from tdhook.targets.units import Layer

__all__ = ["Inside"]


@dataclass(frozen=True)
class Inside:
    """What the places are that a target names.

    Attributes:
        modules: by place, the path of a module, and which of its calls is meant, if that is said.
        keys: places that are keys which the model reads or writes.
        operations: selectors of operations.
        read: the keys that the model reads.
    """

    modules: Mapping[Place, tuple[str, int | None]] = field(default_factory=dict)
    keys: tuple[NestedKey, ...] = ()
    operations: tuple[OfOperations, ...] = ()
    read: tuple[NestedKey, ...] = ()

    @staticmethod
    def of(model: Model, places: Iterable[Place], known: Iterable[NestedKey]) -> Inside:
        """Find the places in a model.

        Args:
            model: the model.
            places: what a target names.
            known: keys that modules inside it write.

        Raises:
            ValueError: there is no such place.
        """
        modules: dict[Place, tuple[str, int | None]] = {}
        keys: list[NestedKey] = []
        operations: list[OfOperations] = []
        read = tuple(map(unravel_key, model.attributed))
        written = {*known, *read}
        for place in places:
            if isinstance(place, OfOperations):
                operations.append(place)
            elif place in written:
                keys.append(place)
            elif isinstance(place, tuple):
                named = ", ".join(map(repr, sorted(written, key=str)))
                raise ValueError(f"the model neither reads nor writes {place!r}; it has {named}")
            else:
                modules[place] = _module(model, place)
        return Inside(modules, tuple(keys), tuple(operations), read)

    @property
    def paths(self) -> list[str]:
        """The paths of the modules."""
        return [path for path, _ in self.modules.values()]

    def passes_only(self, name: str, *, asked: Iterable[Iterable[str]]) -> bool:
        """Whether a module, by path and call, is one that relevance passes, and none whose own is asked for."""
        path, _, call = name.rpartition(":")
        names = {name, path} if call.isdigit() else {name}
        return not names.isdisjoint(self.paths) and all(names.isdisjoint(paths) for paths in asked)

    def layer(
        self,
        place: Place,
        batch: Size,
        modules: Mapping[str, Tensor],
        keys: Mapping[NestedKey, Tensor],
        performed: Mapping[OfOperations, Sequence[Output]],
        flat: bool,
    ) -> Layer:
        """The layer at a place, as one run left it behind.

        Args:
            place: where.
            batch: the batch size.
            modules: outputs of modules by path and call.
            keys: values of keys.
            performed: outputs of operations.
            flat: whether the model ran on a flat batch.

        Raises:
            ValueError: the model did not come there, or several times.
        """
        if isinstance(place, OfOperations):
            return _layer(repr(place), _only(place, performed.get(place, ())), batch, flat)
        if place in self.keys:
            if place not in keys:
                raise ValueError(f"the model wrote no floating-point {place!r} in this call")
            return _layer(repr(place), keys[place], batch, flat and place not in self.read)
        path, call = self.modules[place]
        names = calls_of(path, modules)
        count = len(names)
        if call is None and count > 1:
            raise ValueError(
                f"module {path!r} was called {count} times: say which call relevance passes, '{path}:0' is the first"
            )
        if (call or 0) >= count:
            raise ValueError(f"module {path!r} was called {count} times, so that nothing passes {place!r}")
        return _layer(repr(place), modules[names[call or 0]], batch, flat)


def _module(model: Model, place: str) -> tuple[str, int | None]:
    """The path of a module, or of what it is given, and which call is meant."""
    try:
        model.submodule(module_path(place))
    except ValueError:
        path, colon, call = place.rpartition(":")
        if not (colon and call.isdigit()):
            raise
        model.submodule(module_path(path))
        return path, int(call)
    return place, None


def _only(place: OfOperations, found: Sequence[Output]) -> Tensor:
    if len(found) == 1:
        return found[0].value
    if not found:
        raise ValueError(
            f"the model performs no operation {place!r} on what depends on an attributed input, outside of torch's own "
            "layers: name the path of the module"
        )
    sites = [one.site for one in found[:6]]
    listed = ", ".join(f"{at.operation} in {at.name!r}" if at.name else str(at.operation) for at in sites)
    more = ", ..." if len(found) > 6 else ""
    raise ValueError(
        f"{place!r} means {len(found)} operations ({listed}{more}): choose one by First(...), Last(...), or the module "
        "around it, Op(...) & Name(...)"
    )


def _layer(name: str, value: Tensor, batch: Size, flat: bool) -> Layer:
    """A value with the axes of the batch in front, all of them or as one; or with another axis there.

    Raises:
        NotImplementedError: several processes hold it together.
    """
    if is_sharded(value) or spread_of((value,), {}):
        raise NotImplementedError(
            f"of {name} each process holds its own part, and numbers its own units: name a place whose values are "
            "whole in each, or have them made so (output_layouts=Replicate())"
        )
    if not flat and value.shape[: len(batch)] == batch:
        return Layer(name, value, len(batch), batch)
    if value.dim() == 0:
        raise ValueError(f"{name} is one number, which has no units")
    if value.shape[0] == batch.numel():
        return Layer(name, value, 1, batch)
    return Layer(name, value, 1, value.shape[:1], folded=True)
