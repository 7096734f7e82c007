"""Putting a page together: template, numbers, pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.composites import Composite
from tdhook.files import write_whole
from tdhook.markup import encodable
from tdhook.pages.pictures import Pictures, checked_frames, frames_of_observation, pictures_of
from tdhook.pages.preparation import Course, View, course_of, largest_rows, picture_axes, views_of
from tdhook.pages.provenance import (
    account_html,
    composite_html,
    list_html,
    summary_html,
    target_text,
    text_html,
    versions,
)
from tdhook.relevance.composites.composite import Pairs, preset
from tdhook.rl.rollouts import Conservation
from tdhook.targets import TargetLike

__all__ = ["assembled", "write_report"]

_STEPS = 20_000
_ROWS = 24
_VIEWS = 24
_NUMBERS = 2_500_000
"""How many steps, features, outputs, and of relevance and observations together how many numbers a page holds."""

_SCRIPTS = ("data.js", "drawing.js", "timeline.js", "page.js")


def write_report(
    rollout: TensorDictBase,
    path: str | os.PathLike[str],
    *,
    features: Sequence[str] | None = None,
    actions: Sequence[str] = (),
    key: NestedKey = ("attr", "observation"),
    more: Sequence[NestedKey] = (),
    frame: NestedKey = "frame",
    composite: Composite | Pairs | str | None = None,
    method: str | None = None,
    target: TargetLike = None,
    baseline: str | None = None,
    account: Conservation | None = None,
    title: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an explained rollout as one HTML file that needs nothing else: no network, no library, no server.

    The page shows each step under a slider, with its frame and the relevance on it, if there are such, beside relevance
    and observed value of each feature; relevance over time; the mean by action; and where it all comes from. It stays
    below 20 MB: of very long rollouts the beginning is shown, of many features those of the largest mean absolute
    relevance, and frames are thinned. The page says what was left out; its tables are of the whole rollout.

    Args:
        rollout: of batch size ``[*batch, time]``. Frames are uint8, ``[*batch, time, height, width, 3]``; relevance on
            them lies under ``("attr", "frame")``, ``[*batch, time, height, width]`` or, for several outputs,
            ``[*batch, time, outputs, height, width]``. With ``("ledger", ...)`` in it, each step shows its account.
        path: file to write; missing folders are made, and a file is replaced, by the whole page.
        features: one name per entry of what ``key`` explains, flattened; of its last axis alone, for each agent, say;
            or of a picture one per channel. By default x0, x1, ...
        actions: one name per action; none where the action is not one of several.
        key: where the relevance is, ``[*batch, time, *features]`` or, for several outputs, each of which can be chosen
            on the page, ``[*batch, time, outputs, *features]``. What was observed lies at the same key without
            ``attr``. A picture of at least 8×8 pixels with channels first or last is shown as one, even where there is
            no frame.
        more: further relevance that can be chosen on the page.
        frame: key of the frames; not there, there are none.
        composite: what it was explained with: a composite, its pairs or the name of a preset.
        method: the name of another method than layer-wise relevance propagation, if it was explained by one.
        target: what is explained.
        baseline: what it is compared with, in words, if its difference from there is explained.
        account: of the relevance, see :func:`tdhook.rl.rollouts.conservation`; by default that of the ledger in the
            rollout, if it has one.
        title: of the page.
        metadata: whatever else there is to say, by name: environment, seed, checkpoint.

    Returns:
        The path.

    Raises:
        KeyError: the rollout has no relevance under ``key``.
        ValueError: the rollout has no steps, relevance is not finite, or names and shapes do not fit together.
        IsADirectoryError: the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where the page is to be a file")
    course = course_of(rollout, actions)
    maps = rollout.get(("attr", "frame"), None) if key != ("attr", "frame") else None
    views = views_of(rollout, course, [key, *more], features, actions, maps)
    frames = _frames(rollout, course, views, key, frame)
    rules = _as_composite(composite)
    account = _account(course) if account is None else account

    notes: list[str] = []
    course, views, frames = _within_limits(course, views, frames, notes)
    rows = _rows(course, views, notes)
    pictures = pictures_of(frames, views)
    notes += [] if pictures is None else pictures.notes
    facts = {} if target is None else {"target": target_text(target)}
    facts |= {} if baseline is None else {"baseline": baseline}
    facts |= {str(name): value for name, value in (metadata or {}).items()}
    page = assembled(
        "page.html",
        ("page.css",),
        _SCRIPTS,
        {
            "title": text_html(title or "An explained rollout"),
            "subtitle": text_html(_subtitle(views[0])),
            "notes": "".join(f"<li>{text_html(note)}</li>" for note in notes),
            "summaries": "".join(
                f'<div data-view="{i}"{" hidden" if i else ""}>{summary_html(view, shown)}</div>'
                for i, (view, shown) in enumerate(zip(views, rows, strict=True))
            ),
            "account": account_html(account, rules, baseline is not None),
            "composite": composite_html(rules, method),
            "facts": list_html(facts)
            if facts
            else "<p>Nothing was said of target, environment and seed.</p>",
            "versions": list_html(versions()),
            "data": _as_json(_data(course, views, rows, pictures, actions)),
        },
    )
    write_whole(path, page.encode("utf-8"))
    return path


def _as_composite(composite: Composite | Pairs | str | None) -> Composite | None:
    if composite is None or isinstance(composite, Composite):
        return composite
    return preset(composite) if isinstance(composite, str) else Composite(composite)


def _account(course: Course) -> Conservation | None:
    if course.ledger is None:
        return None
    target, arrived, absorbed, gap = course.ledger.double().flatten(0, 1).unbind(-1)
    size = target.abs().mean()
    error = gap.abs().max() / size.clamp(min=torch.finfo(torch.float64).tiny)
    return Conservation(
        target=target.mean().item(),
        arrived=arrived.mean().item(),
        absorbed=absorbed.mean().item(),
        size=size.item(),
        error=error.item(),
    )


def _frames(
    rollout: TensorDictBase, course: Course, views: Sequence[View], key: NestedKey, frame: NestedKey
) -> Tensor | None:
    batch = (course.environments, course.time)
    given = rollout.get(frame, None)
    if given is not None:
        return checked_frames(given, batch, str(frame))
    observed = rollout.get(key[1:], None) if isinstance(key, tuple) and len(key) > 1 else None
    if observed is None or views[0].maps is None:
        return None
    axes = picture_axes(observed.shape[rollout.batch_dims :])
    return None if axes is None else frames_of_observation(observed, batch, axes[0] == 0)


def _subtitle(view: View) -> str:
    summary = view.summary
    totals = [episode.total for episode in summary.episodes if episode.finished]
    steps = "1 step" if summary.steps == 1 else f"{summary.steps:,} steps"
    if not totals:
        return f"{steps} in {len(summary.episodes)} unfinished episode{'s' * (len(summary.episodes) > 1)}"
    if len(summary.episodes) == 1:
        return f"{steps} in one episode, with a return of {totals[0]:.4g}"
    mean = f"{sum(totals) / len(totals):.4g}"
    return f"{steps} in {len(summary.episodes)} episodes, {len(totals)} of them finished; their mean return is {mean}"


def _within_limits(
    course: Course, views: list[View], frames: Tensor | None, notes: list[str]
) -> tuple[Course, list[View], Tensor | None]:
    if len(views) > _VIEWS:
        notes.append(f"The first {_VIEWS} of {len(views)} explanations are shown.")
        views = views[:_VIEWS]
    environments = min(course.environments, max(1, _STEPS // course.time))
    time = min(course.time, _STEPS)
    if environments < course.environments:
        notes.append(f"The first {environments} of {course.environments} environments are shown.")
    if time < course.time:
        notes.append(f"The first {time:,} of {course.time:,} steps are shown.")
    views = [view.cut(environments, time) for view in views]
    return course.cut(environments, time), views, None if frames is None else frames[:environments, :time]


def _rows(course: Course, views: Sequence[View], notes: list[str]) -> list[list[int]]:
    """Which features of each view are shown."""
    steps = course.environments * course.time
    most = min(_ROWS, max(4, _NUMBERS // (steps * (1 + len(views)))))
    if any(len(view.rows) > most for view in views):
        notes.append(
            f"Of more than {most} features those of the largest mean |relevance| are shown, the others as their sum."
        )
    return [largest_rows(view, most) for view in views]


def _data(
    course: Course,
    views: Sequence[View],
    rows: Sequence[list[int]],
    pictures: Pictures | None,
    actions: Sequence[str],
) -> dict[str, object]:
    return {
        "environments": course.environments,
        "time": course.time,
        "actions": list(map(encodable, actions)) if course.taken is not None else [],
        "taken": _packed(course.taken, "<i2"),
        "action": _packed(None if course.action is None else course.action[..., :_ROWS], "<f4"),
        "reward": _packed(course.reward, "<f4"),
        "starts": _packed(course.starts, "|u1"),
        "ledger": _packed(course.ledger, "<f4"),
        "views": [_view_data(view, shown) for view, shown in zip(views, rows, strict=True)],
        "pictures": None
        if pictures is None
        else {
            "every": pictures.every,
            "images": pictures.images,
            "kind": pictures.kind,
            "maps": pictures.maps,
            "shape": pictures.shape,
            "reach": pictures.reach,
            "tops": pictures.tops,
        },
    }


def _view_data(view: View, shown: list[int]) -> dict[str, object]:
    relevance, names = view.relevance[..., shown], [view.rows[i] for i in shown]
    if len(shown) < len(view.rows):
        rest = torch.ones(len(view.rows), dtype=torch.bool)
        rest[shown] = False
        relevance = torch.cat([relevance, view.relevance[..., rest].sum(-1, keepdim=True)], dim=-1)
        names.append(f"{len(view.rows) - len(shown)} others (sum)")
    size = relevance.abs().flatten()
    some = size[:: 1 + len(size) // 10_000_000]
    return {
        "label": encodable(view.label),
        "rows": list(map(encodable, names)),
        "relevance": _packed(relevance, "<f4"),
        "values": _packed(None if view.values is None else view.values[..., shown], "<f4"),
        "top": torch.quantile(some, 0.995, interpolation="higher").item() or size.max().item() or 1.0,
        "most": size.max().item(),
        "total": _packed(view.relevance.sum(-1), "<f4"),
    }


def _packed(values: Tensor | None, kind: str) -> dict[str, str] | None:
    """Numbers deflated and in base64; floats to four digits, which makes them half as many bytes."""
    if values is None:
        return None
    array = values.numpy().astype(kind)
    if kind == "<f4":  # 14 of the 24 bits of a significand, rounded
        array = ((array.view("<u4").astype(np.uint64) + 0x200) & 0xFFFFFC00).astype("<u4")
    return {"kind": kind, "data": base64.b64encode(zlib.compress(array.tobytes(), 9)).decode("ascii")}


def _as_json(data: dict[str, object]) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def assembled(page: str, styles: Sequence[str], scripts: Sequence[str], parts: Mapping[str, str]) -> str:
    """A page of a template.

    Args:
        page: name of the template of its body, below the heading.
        styles: those of its style sheets, in their order.
        scripts: those of its scripts, likewise; none where it has none.
        parts: what is filled in, as HTML, by name.
    """
    folder = resources.files("tdhook.pages") / "template"
    style = "".join((folder / name).read_text(encoding="utf-8") for name in styles)
    body = "\n".join((folder / name).read_text(encoding="utf-8") for name in scripts)
    script = f'"use strict";\n(() => {{\n{body}\n}})();\n'
    known = {**parts, "style": style, "script": script, "policy": _policy(script if scripts else None, style)}
    frame, body = ((folder / name).read_text(encoding="utf-8") for name in ("frame.html", page))
    template = frame.replace("{{body}}", body)
    # In one pass: what is filled in is never looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: known[place[1]], template)


def _policy(script: str | None, style: str) -> str:
    """A content security policy: this script and this style, embedded images, and nothing else, no network either."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    scripts = "" if script is None else f"script-src {digest(script)}; "
    return f"default-src 'none'; img-src data:; {scripts}style-src {digest(style)}"
