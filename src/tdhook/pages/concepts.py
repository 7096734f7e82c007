"""The page of the units of a layer: which of them matter for each action, and what each of these responds to."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.concepts.found import Found
from tdhook.concepts.graphs import AttributionGraph
from tdhook.configuration import write_key
from tdhook.files import write_whole
from tdhook.keys import parts_of, under
from tdhook.pages.figures import field_html, heat_html, picture_html, words_html
from tdhook.pages.names import feature_names
from tdhook.pages.pictures import frames_of_observation
from tdhook.pages.preparation import picture_axes
from tdhook.pages.provenance import list_html, number, signed, text_html
from tdhook.pages.writing import assembled
from tdhook.plots.graphs import relevance_graph

__all__ = ["UnitShown", "write_concepts_report"]

_TEXTS = (
    '<p class="hint">Below, the texts for which each of these units was worth most, with the relevance that passes '
    "this unit alone: red speaks for what is explained, blue against it. Underlined is the word at which it was worth "
    "most.</p>"
)
_NOTE = (
    '<p class="hint">Below, the steps in which each of these units was worth most, with the relevance that passes this '
    "unit alone: red speaks for what is explained, blue against it. The box is around all that the unit can see where "
    "it was worth most, which is shown enlarged beneath.</p>"
)
_MOST = ' class="most"'
_FEATURES = 12
"""How many features of a vector are shown, those of the largest relevance."""


@dataclass(frozen=True)
class UnitShown:
    """A unit with the steps that it responds to.

    Attributes:
        unit: its number.
        frames: what :meth:`~tdhook.concepts.ReferenceSamples.frames` gave.
        words: of each step, if these are texts: what the places along the first axis of its inputs are called. The last
            of them are named, where there are fewer than places, as in texts that are padded on the left.
    """

    unit: int
    frames: TensorDict
    words: Sequence[Sequence[str]] = ()


def write_concepts_report(
    found: Found,
    shown: Mapping[int, Sequence[UnitShown]],
    path: str | os.PathLike[str],
    *,
    by: str = "relevance",
    graphs: Mapping[int, AttributionGraph] | None = None,
    groups: Mapping[int, str] | None = None,
    features: Sequence[str] = (),
    title: str = "What units respond to",
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write what units of a layer respond to as one HTML file that needs nothing else: no network, no script.

    The page shows how much each of the units matters in each group, and of each unit the steps in which it mattered
    most: pictures with the relevance that passes the unit, and the part of them that it sees, texts, or vectors as
    tables.

    Args:
        found: of the units, :attr:`~tdhook.concepts.ReferenceSamples.found`.
        shown: which are shown, of each group.
        path: file to write; it is replaced, by the whole page.
        by: what steps were chosen by, ``"relevance"`` or ``"value"``.
        graphs: of groups, what units of several layers hand on (:func:`~tdhook.concepts.attribution_graph`), of one
            step or a mean; matplotlib draws them.
        groups: what groups are called.
        features: one name for each feature of a vector.
        title: of the page.
        facts: whatever else there is to say, by name.

    Returns:
        The path.

    Raises:
        ImportError: there are graphs, and matplotlib is not installed.
        ValueError: a text has more words than its relevance has places.
        IsADirectoryError: the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where the page is to be a file")
    names = {group: f"group {group}" for group in found.groups} | dict(groups or {})
    units = list(dict.fromkeys(one.unit for several in shown.values() for one in several))
    note = _TEXTS if any(one.words for several in shown.values() for one in several) else _NOTE
    sections = [_section(f"Units by mean {by}", _table(found, units, names) + note)]
    for group, several in shown.items():
        body = "".join(_unit(found, group, one, names, by, features) for one in several)
        if graphs is not None and group in graphs:
            body = _graph(graphs[group], features) + body
        sections.append(_section(names[group], body or '<p class="hint">No unit speaks for it.</p>'))
    count = f"{int(found.count.sum()):,} steps, {found.units:,} units"
    text = assembled(
        "concepts.html",
        ("page.css", "dataset.css", "concepts.css"),
        (),
        {
            "title": text_html(title),
            "subtitle": text_html(count),
            "sections": "".join(sections),
            "facts": list_html(dict(facts or {})),
        },
    )
    write_whole(path, text.encode("utf-8"))
    return path


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{text_html(heading)}</h2>{body}</section>"


def _graph(graph: AttributionGraph, features: Sequence[str]) -> str:
    """A graph as a picture, inputs called by their features where these are as many."""
    names = {name: features for name in graph.inputs if graph.relevance[name].shape[-1] == len(features)}
    file = io.BytesIO()
    relevance_graph(graph, names=names).savefig(file, dpi=110)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    hint = "What units hand on to earlier ones on average, in the steps below: red for, blue against."
    return (
        f'<div class="wide"><img class="graph" alt="{hint}" src="data:image/png;base64,{data}"></div>'
        f'<p class="hint">{hint}</p>'
    )


def _table(found: Found, units: Sequence[int], names: Mapping[int, str]) -> str:
    """How much each of the units matters in each group."""
    means = {group: found.mean(group) for group in found.groups}
    absolute = found.absolute()
    lines = []
    for unit in units:
        most = max(found.groups, key=lambda group: float(means[group][unit]))
        cells = "".join(
            f"<td{_MOST if group == most else ''}>{signed(float(means[group][unit]))}</td>"
            for group in found.groups
        )
        size = number(float(absolute[unit]))
        lines.append(f'<tr><th scope="row">unit {unit}</th>{cells}<td>{size}</td></tr>')
    counts = found.count.tolist()
    heads = [
        f"{text_html(names[group])} <span>{count:,}×</span>"
        for group, count in zip(found.groups, counts, strict=True)
    ]
    head = "".join(f'<th scope="col">{one}</th>' for one in ("", *heads, "mean size"))
    return (
        '<div class="wide"><table class="numbers"><caption>The units that are shown below: the mean of each in the '
        f"steps of a group</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _unit(
    found: Found, group: int, one: UnitShown, names: Mapping[int, str], by: str, features: Sequence[str]
) -> str:
    """A unit with its steps."""
    frames = one.frames
    mean = signed(float(found.mean(group)[one.unit]))
    parts = [f"<h3>Unit {one.unit}<small>mean {by} {mean} in {text_html(names[group])}</small></h3>"]
    captions = [_caption(frames[i]) for i in range(len(frames))]
    if not len(frames):
        parts.append('<p class="hint">No steps.</p>')
    for key in _inputs(frames):
        relevance, value = frames.get(under("attr", key)), frames.get(under("data", key), None)
        box = frames.get(under("field", key), None)
        axes = picture_axes(relevance.shape[1:])
        if len(_inputs(frames)) > 1:
            parts.append(f"<h4>{text_html(write_key(key))}</h4>")
        if one.words:
            parts.append(_texts(one, relevance, captions))
        elif axes is None:
            parts.append(_vectors(relevance, value, captions, features))
        else:
            parts.append(_pictures(relevance, value, box, captions, axes))
    return f'<div class="unit">{"".join(parts)}</div>'


def _inputs(frames: TensorDict) -> list[NestedKey]:
    attr = frames.get("attr", None)
    return [] if attr is None else list(attr.keys(True, True))


def _caption(frame: TensorDict) -> str:
    """What is known of a step, in words."""
    step = int(frame["step"])
    told = [f"row {int(frame['row']):,}" + (f", {step}" if step else ""), signed(float(frame["amount"]))]
    note = frame.get("note", None)
    for key in () if note is None else note.keys(True, True):
        told.append(f"{parts_of(key)[-1].replace('_', ' ')} {float(note.get(key)):g}")
    return "; ".join(told)


def _pictures(
    relevance: Tensor,
    value: Tensor | None,
    box: Tensor | None,
    captions: Sequence[str],
    axes: tuple[int, tuple[int, int]],
) -> str:
    """Steps as pictures, with the relevance of the unit on them, and beneath the parts that it sees."""
    channel, sides = axes
    maps = relevance.sum(channel + 1)
    if value is None or value.shape != relevance.shape:
        drawn = "".join(heat_html(one, caption) for one, caption in zip(maps, captions, strict=True))
        return f'<div class="gallery">{drawn}</div>'
    if (
        value.shape[channel + 1] not in (1, 3) and len(value.unique()) > 2
    ):  # a stack of frames, the last of them now
        value = value.narrow(channel + 1, value.shape[channel + 1] - 1, 1)
    frames = frames_of_observation(value[None], [1, len(value)], channel == 0)[0]
    height, width = maps.shape[1:]
    boxes = None if box is None else box[..., list(sides)]
    if boxes is None or bool((boxes.diff(dim=1)[:, 0] == boxes.new_tensor([height, width])).all()):
        shown = zip(frames, maps, captions, strict=True)
        return f'<div class="gallery">{"".join(picture_html(*one) for one in shown)}</div>'
    pairs = (field_html(*one) for one in zip(frames, maps, boxes, captions, strict=True))
    return f'<div class="gallery">{"".join(pairs)}</div>'


def _texts(one: UnitShown, relevance: Tensor, captions: Sequence[str]) -> str:
    """Steps as texts, each word on the colour of its relevance; underlined is the one at which most of it passed."""
    amounts = relevance.flatten(2).sum(-1) if relevance.dim() > 2 else relevance
    places = one.frames.get("place")
    texts = []
    for i, (words, caption) in enumerate(zip(one.words, captions, strict=True)):
        first = amounts.shape[1] - len(words)
        if first < 0:
            raise ValueError(
                f"step {i} of unit {one.unit} has {len(words)} words, and its relevance {amounts.shape[1]} places"
            )
        along = places.shape[-1] > 0
        place = int(places[i, 0]) - first if along else None
        texts.append(words_html(words, amounts[i, first:], place, caption))
    return "".join(texts)


def _vectors(
    relevance: Tensor, value: Tensor | None, captions: Sequence[str], features: Sequence[str]
) -> str:
    """Steps as a table of what was observed and its relevance."""
    names, flat = feature_names(relevance.shape[1:], features), relevance.flatten(1)
    seen = None if value is None or value.shape != relevance.shape else value.flatten(1)
    most = sorted(flat.abs().mean(0).topk(min(_FEATURES, flat.shape[1])).indices.tolist())
    lines = []
    for row, caption in enumerate(captions):
        cells = []
        for i in most:
            amount = float(flat[row, i])
            at = "" if seen is None else f" <small>at {number(float(seen[row, i]))}</small>"
            sign = "positive" if amount > 0 else "negative"
            cells.append(f'<td><span class="{sign}">{signed(amount)}</span>{at}</td>')
        lines.append(f'<tr><th scope="row">{text_html(caption)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{text_html(names[i])}</th>' for i in most)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
