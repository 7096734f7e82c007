"""The page of a whole data set: relevance by group, its distribution, extreme rows, and the policy's strategies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.configuration import write_key
from tdhook.datasets.reducers import Histogram, Moments, TopRows
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.result import Result
from tdhook.datasets.rows import Rows
from tdhook.datasets.spray import Strategies
from tdhook.datasets.stored import require_same_source
from tdhook.files import write_whole
from tdhook.pages.figures import COLOURS, bars_svg, cloud_svg, heat_html, picture_html, ranges_svg
from tdhook.pages.identity import facts_of, identity_of
from tdhook.pages.names import feature_names, group_name
from tdhook.pages.pictures import frames_of_observation
from tdhook.pages.preparation import picture_axes
from tdhook.pages.provenance import list_html, number, signed, text_html
from tdhook.pages.writing import assembled

__all__ = ["write_dataset_report"]

_FEATURES = 24
_GROUPS = 12
_EXTREME, _LISTED = 6, 3
"""Pictures of rows, and lines of a table, that are shown of a group or cluster."""


@dataclass(frozen=True)
class _Page:
    """What all sections know.

    Attributes:
        result: what the job has made.
        source: the rows that were explained.
        features: names.
        actions: names.
        frame: the entry that is shown as a picture, by default the input itself.
    """

    result: Result
    source: Rows | None
    features: Sequence[str]
    actions: Sequence[str]
    frame: NestedKey | None

    def group(self, reducer: Reducer, value: int) -> str:
        """What a group is called."""
        return group_name(reducer.by, value, self.actions)

    def names(self, shape: Sequence[int]) -> list[str]:
        """A name for each feature, flattened."""
        return feature_names(shape, self.features)

    def key(self, reducer: Reducer) -> NestedKey | None:
        """The input whose relevance it is made of."""
        if reducer.key is not None:
            return reducer.key
        if self.source is None:
            return None
        read = self.source.read(0, 1)
        return next((key for key in ("observation", "pixels") if read.get(key, None) is not None), None)

    def row(self, row: int) -> TensorDictBase | None:
        """A row of the source."""
        return None if self.source is None else self.source.read(row, row + 1)[0]

    def shown(self, row: int, relevance: Tensor, reducer: Reducer, caption: str) -> str:
        """A row with its relevance ``[*features]``: a picture, or nothing where it is none."""
        axes = picture_axes(relevance.shape)
        if axes is None:
            return ""
        found, key = self.row(row), self.frame or self.key(reducer)
        value = None if found is None or key is None else found.get(key, None)
        flat = relevance.sum(axes[0])
        if not isinstance(value, Tensor) or picture_axes(value.shape) is None:
            return heat_html(flat, caption)
        seen = picture_axes(value.shape)
        assert seen is not None
        if self.frame is None and value.shape[seen[0]] not in (
            1,
            3,
        ):  # a stack of frames, the last of them now
            value = value.narrow(seen[0], value.shape[seen[0]] - 1, 1)
        frame = frames_of_observation(value[None], [1, 1], seen[0] == 0)[0, 0]
        return picture_html(frame, flat if frame.shape[:2] == flat.shape else None, caption)


def write_dataset_report(
    result: Result,
    path: str | os.PathLike[str],
    *,
    source: Rows | None = None,
    strategies: Mapping[str, Mapping[int, Strategies]] | None = None,
    features: Sequence[str] = (),
    actions: Sequence[str] = (),
    frame: NestedKey | None = None,
    title: str = "An explained data set",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write what a job has made as one HTML file that needs nothing else: no network, no library, no script.

    The page shows what rows were reduced to: mean relevance by group, quantiles of it, the rows that have most of it,
    and the clusters of a sample. It reads the sources's rows only where it shows them.

    Args:
        result: of a job that reduces rows.
        path: file to write; it is replaced, by the whole page.
        source: the rows that were explained, for their frames and features.
        strategies: of each :class:`~tdhook.datasets.reducers.Reservoir`, by its name and by group, what
            :meth:`~tdhook.datasets.spray.SpRAy.by_group` finds.
        features: one name for each feature.
        actions: one name for each action.
        frame: the entry of a row that is shown as a picture; by default the input, if that is one.
        title: of the page.
        facts: whatever else there is to say, by name.

    Returns:
        The path.

    Raises:
        IsADirectoryError: the path is a folder.
        ValueError: rows were reduced to nothing, or the source is another.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where the page is to be a file")
    if not result.reducers:
        raise ValueError(
            "rows were reduced to nothing, and a page shows that: give the job reduce=[Moments(), ...]"
        )
    if source is not None:
        require_same_source(result.stored, source)
    page, sections = _Page(result, source, features, actions, frame), []
    for kind, heading, part in (
        (Moments, "Relevance", _moments),
        (Histogram, "Distribution", _histogram),
        (TopRows, "Extreme rows", _extreme),
    ):
        for name, reducer in result.reducers.items():
            if isinstance(reducer, kind):
                sections.append(_section(_of(heading, reducer), part(page, reducer, result.reduced[name])))
    for name, groups in (strategies or {}).items():
        reducer = result.reducers[name]
        body = "".join(
            _strategies(page, reducer, result.reduced[name], group, of) for group, of in groups.items()
        )
        sections.append(_section(_of("Strategies", reducer), _NOTE + body))
    rows = f"{result.stored.units.rows:,} rows explained"
    missing = int((~result.done).sum())
    text = assembled(
        "dataset.html",
        ("page.css", "dataset.css"),
        (),
        {
            "title": text_html(title),
            "subtitle": text_html(rows + (f", {missing:,} of them not yet" if missing else "")),
            "sections": "".join(sections),
            "facts": list_html({**(facts or {}), **facts_of(result.stored)}),
            "job": f'<div class="identity">{list_html(identity_of(result.stored))}</div>',
        },
    )
    write_whole(path, text.encode("utf-8"))
    return path


_NOTE = (
    '<p class="hint">Explanations of a sample of rows, in clusters of those that are alike (SpRAy). A small cluster '
    "that is far from the others is a reason of its own: look whether it is one that the policy should have.</p>"
)


def _of(heading: str, reducer: Reducer) -> str:
    return heading if reducer.key is None else f"{heading} of {write_key(reducer.key)}"


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{text_html(heading)}</h2>{body}</section>"


def _key(names: Sequence[str]) -> str:
    items = (
        f'<li class="c{i % COLOURS}"><span>{text_html(name)}</span></li>' for i, name in enumerate(names)
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def _moments(page: _Page, reducer: Reducer, found: TensorDict) -> str:
    groups = [page.group(reducer, value) for value in found["group"].tolist()][:_GROUPS]
    counts, mean = found["count"].tolist(), found["mean"]
    if picture_axes(mean.shape[1:]) is not None:
        axis = picture_axes(mean.shape[1:])
        assert axis is not None
        maps = "".join(
            heat_html(mean[i].sum(axis[0]), f"{group}, {counts[i]:,} rows") for i, group in enumerate(groups)
        )
        sizes = "".join(
            heat_html(found["absolute"][i].sum(axis[0]), f"{group}, mean |relevance|")
            for i, group in enumerate(groups)
        )
        return f'<h3>Mean relevance</h3><div class="gallery">{maps}</div><div class="gallery">{sizes}</div>'
    names, flat, absolute = page.names(mean.shape[1:]), mean.flatten(1), found["absolute"].flatten(1)
    size = (absolute * (found["count"].double() / found["count"].sum())[:, None]).sum(0)
    heads = [f"{text_html(group)} <span>{counts[i]:,}×</span>" for i, group in enumerate(groups)]
    lines = []
    for i in sorted(size.topk(min(_FEATURES, len(size))).indices.tolist()):
        cells = "".join(f"<td>{signed(value)}</td>" for value in flat[: len(groups), i].tolist())
        lines.append(
            f'<tr><th scope="row">{text_html(names[i])}</th>{cells}<td>{number(size[i].item())}</td></tr>'
        )
    head = "".join(f'<th scope="col">{one}</th>' for one in ("feature", *heads, "mean |relevance|"))
    few = "" if len(lines) == len(size) else f"; the {len(lines)} of {len(size)} features that have most"
    return (
        f'<div class="wide"><table class="numbers"><caption>Mean relevance of a row{few}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _histogram(page: _Page, reducer: Reducer, found: TensorDict) -> str:
    groups = [page.group(reducer, value) for value in found["group"].tolist()][:_GROUPS]
    quantiles = found["quantiles"][:_GROUPS]
    pooled = quantiles.dim() == 2
    quantiles = quantiles[:, None] if pooled else quantiles.flatten(1, -2)
    names = ["all features"] if pooled else page.names(found["quantiles"].shape[1:-1])
    spread = (quantiles[..., 4] - quantiles[..., 0]).amax(0)
    shown = sorted(spread.topk(min(_FEATURES, len(spread))).indices.tolist())
    hint = "Line: 1 to 99 per cent of all values; bar: the middle half; mark: the median. Signed logarithmic scale."
    figure = ranges_svg([names[i] for i in shown], groups, quantiles[:, shown])
    return f'{_key(groups)}<div class="wide">{figure}</div><p class="hint">{hint}</p>'


def _extreme(page: _Page, reducer: Reducer, found: TensorDict) -> str:
    parts = []
    relevance = found.get("relevance", None)
    for group in found["group"].unique().tolist()[:_GROUPS]:
        of = (found["group"] == group).nonzero()[:_EXTREME, 0].tolist()
        rows = [(found["row"][i].item(), None if relevance is None else relevance[i]) for i in of]
        captions = [f"row {found['row'][i].item():,}: {signed(found['score'][i].item())}" for i in of]
        parts.append(
            f"<h3>{text_html(page.group(reducer, group))}</h3>{_gallery(page, reducer, rows, captions)}"
        )
    return "".join(parts)


def _gallery(
    page: _Page,
    reducer: Reducer,
    rows: Sequence[tuple[int, Tensor | None]],
    captions: Sequence[str],
    before: str = "",
) -> str:
    """Rows as pictures, or as a table of what was observed and its relevance."""
    given = [(row, relevance) for row, relevance in rows if relevance is not None]
    if len(given) == len(rows):
        pictures = [
            page.shown(row, relevance, reducer, caption)
            for (row, relevance), caption in zip(given, captions, strict=True)
        ]
        if all(pictures):
            return f'<div class="gallery">{before}{"".join(pictures)}</div>'
    lines = []
    shape = given[0][1].shape if given else torch.Size()
    names, key = page.names(shape), page.key(reducer)
    for (row, relevance), caption in zip(rows, captions, strict=True):
        source = page.row(row)
        value = None if source is None or key is None else source.get(key, None)
        seen = value.flatten().tolist() if isinstance(value, Tensor) and value.shape == shape else None
        cells = []
        for i, amount in enumerate([] if relevance is None else relevance.flatten().tolist()[:_FEATURES]):
            at = "" if seen is None else f" <small>at {number(seen[i])}</small>"
            sign = "positive" if amount > 0 else "negative"
            cells.append(f'<td><span class="{sign}">{signed(amount)}</span>{at}</td>')
        lines.append(f'<tr><th scope="row">{text_html(caption)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{text_html(name)}</th>' for name in names[:_FEATURES])
    return (
        f'<div class="wide"><table class="numbers"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _strategies(page: _Page, reducer: Reducer, drawn: TensorDict, group: int, found: Strategies) -> str:
    place = {row: i for i, row in enumerate(drawn["row"].tolist())}
    clusters = []
    for one in range(len(found)):
        axes = picture_axes(found.mean.shape[1:])
        rows = found.references[one].tolist()[: _EXTREME if axes is not None else _LISTED]
        shown = [(row, drawn["relevance"][place[row]]) for row in rows]
        mean = "" if axes is None else heat_html(found.mean[one].sum(axes[0]), "mean of the cluster")
        apart = f", silhouette {number(found.apart[one].item())}" if len(found) > 1 else ""
        clusters.append(
            f'<div class="cluster c{one % COLOURS}"><h3>{found.share[one].item():.1%} of the rows{apart}</h3>'
            f"{_gallery(page, reducer, shown, [f'row {row:,}' for row in rows], mean)}</div>"
        )
    name, count = page.group(reducer, group), len(found)
    told = f"{count} strategies" if count > 1 else "one strategy"
    gap = "The smallest eigenvalues of the graph of neighbours: as many clusters are told apart as are in colour."
    return (
        f"<h3>{text_html(name)}: {told} in {len(found.row):,} rows</h3>"
        f'<div class="strategies">{cloud_svg(found.embedding, found.label)}'
        f'<div>{bars_svg(found.eigenvalues.tolist(), count)}<p class="hint">{gap}</p></div></div>{"".join(clusters)}'
    )
