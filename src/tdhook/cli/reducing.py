"""Reducers as they are typed, and what rows were reduced to as tables: what `tdhook dataset reduce` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.cli.tables import titled_table
from tdhook.configuration import read_key, write_key
from tdhook.datasets.reducers import Histogram, Moments, Reservoir, TopRows
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.rows import Rows
from tdhook.datasets.unit_rows import UnitRows
from tdhook.markup import visible
from tdhook.pages.names import feature_names, group_name

__all__ = ["action_of", "reduced_tables", "reducers_of"]

_FEATURES = 64
"""Features up to which each has a histogram of its own, unless asked."""
_SHOWN = 12


def reducers_of(
    text: str, by: str | None, keys: Sequence[str], source: Rows | None, inputs: Sequence[NestedKey]
) -> list[Reducer]:
    """The reducers that words stand for.

    Args:
        text: as ``moments,histogram,top:10,sample:1000``, or ``none``.
        by: the entry that tells rows apart, ``none``, or by default the action, where the source has whole numbers or
            truth values of it.
        keys: the inputs whose relevance is reduced, by default each.
        source: the rows that are explained.
        inputs: what the policy reads.

    Raises:
        ValueError: there is no such reducer.
    """
    if text == "none":
        return []
    row = source.read(0, 1) if source is not None and len(source) else None
    group = (action_of(row) if by is None else read_key(by)) if by != "none" else None
    of = [read_key(key) for key in keys] or list(inputs)
    made, named = [], bool(keys) or len(of) > 1
    for key in of:
        ending = f"-{write_key(key)}" if len(of) > 1 else ""
        for word in text.split(","):
            made.append(_reducer(word.strip(), key if named else None, key, group, ending, row))
    return made


def action_of(row: TensorDictBase | None) -> NestedKey | None:
    """The entry with the action of a row, where that is one of several."""
    action = None if row is None else row.get("action", None)
    discrete = isinstance(action, Tensor) and not action.is_floating_point()
    one = isinstance(action, Tensor) and (action[0].numel() == 1 or bool((action.long().sum() == 1).all()))
    return "action" if discrete and one else None


def _reducer(
    word: str,
    key: NestedKey | None,
    of: NestedKey,
    by: NestedKey | None,
    ending: str,
    row: TensorDictBase | None,
) -> Reducer:
    name, _, parameter = word.partition(":")
    if name == "moments" and not parameter:
        return Moments(key, by=by, name=f"moments{ending}")
    if name == "histogram" and parameter in ("", "pooled"):
        value = None if row is None else row.get(of, None)
        many = isinstance(value, Tensor) and value[0].numel() > _FEATURES
        return Histogram(key, by=by, name=f"histogram{ending}", pooled=bool(parameter) or many)
    if name in ("top", "sample") and parameter.isdecimal() and int(parameter):
        if name == "top":
            return TopRows(int(parameter), key, by=by, name=f"top{ending}")
        return Reservoir(int(parameter), key, by=by, name=f"sample{ending}")
    raise ValueError(
        f"--reduce has {word!r} in it; rows are reduced to moments, histogram, histogram:pooled, top:N or sample:N"
    )


def reduced_tables(
    reduced: Mapping[str, TensorDict],
    reducers: Mapping[str, Reducer],
    features: Sequence[str],
    actions: Sequence[str],
) -> list[Table]:
    """What rows were reduced to, as tables."""
    tables = []
    for name, found in reduced.items():
        by = reducers[name].by
        groups = [group_name(by, group, actions) for group in found["group"].tolist()]
        if found.get("mean", None) is not None:
            of_units = isinstance(reducers[name], UnitRows)
            units = [f"unit {i}" for i in range(found["mean"].shape[1])] if of_units else features
            tables.append(_moments(name, found, groups, units))
        elif found.get("quantiles", None) is not None:
            tables.append(_quantiles(name, found, groups, features))
        else:
            tables.append(_rows(name, found, groups))
    return tables


def _moments(name: str, found: TensorDict, groups: list[str], features: Sequence[str]) -> Table:
    mean, absolute = found["mean"].flatten(1), found["absolute"].flatten(1)
    names = feature_names(found["mean"].shape[1:], features)
    counts = found["count"].tolist()
    heads = [f"{group} ({count:,})" for group, count in zip(groups, counts, strict=True)]
    title = _title(f"{name}: mean relevance", "the largest", len(names))
    table = titled_table(title, "feature", *heads, "mean |relevance|", numbers=True)
    weight = found["count"].double() / found["count"].sum()
    size = (absolute * weight[:, None]).sum(0)
    for i in sorted(size.topk(min(_SHOWN, len(size))).indices.tolist()):
        cells = [f"{value:+.4g}" for value in mean[:, i].tolist()]
        table.add_row(Text(visible(names[i])), *cells, f"{size[i].item():.4g}")
    return table


def _quantiles(name: str, found: TensorDict, groups: list[str], features: Sequence[str]) -> Table:
    quantiles = (
        found["quantiles"].flatten(1, -2) if found["quantiles"].dim() > 2 else found["quantiles"][:, None]
    )
    each = (
        feature_names(found["quantiles"].shape[1:-1], features)
        if found["quantiles"].dim() > 2
        else ["all features"]
    )
    title = _title(f"{name}: quantiles of relevance", "the first", len(each))
    table = titled_table(title, "", *(f"{q:.0%}" for q in Histogram.QUANTILES), numbers=True)
    for group, values in zip(groups, quantiles, strict=True):
        for i in range(min(_SHOWN, len(each))):
            table.add_row(
                Text(visible(f"{group}: {each[i]}")), *(f"{value:+.4g}" for value in values[i].tolist())
            )
    return table


def _title(what: str, which: str, count: int) -> str:
    """The title of a table of features, which says if it is not of all."""
    return what if count <= _SHOWN else f"{what}, {which} {_SHOWN} of {count:,} features"


def _rows(name: str, found: TensorDict, groups: list[str]) -> Table:
    score = found.get("score", None)
    columns = ["rows of", "how many", "the first"] + ([] if score is None else ["largest"])
    table = titled_table(f"{name}: {len(groups):,} rows", *columns, numbers=True)
    for group in dict.fromkeys(groups):
        of = [i for i, one in enumerate(groups) if one == group]
        first = ", ".join(str(found["row"][i].item()) for i in of[:5]) + (", ..." if len(of) > 5 else "")
        largest = [] if score is None else [f"{score[of[0]].item():+.4g}"]
        table.add_row(Text(visible(group)), f"{len(of):,}", first, *largest)
    return table
