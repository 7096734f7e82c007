"""Relevance over time, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdhook.plots.style import (
    FAINT,
    INK,
    RELEVANCE_COLOURS,
    colour_of,
    draw_legend,
    draw_scale,
    draw_title,
    figure_class,
    finite,
    largest,
    plain,
    require_names,
    top_of,
    verbatim,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["relevance_over_time"]

_COLUMNS = 1000
"""About how many steps have room side by side; where there are more, several share a column."""


def relevance_over_time(
    relevance: Tensor,
    features: Sequence[str],
    actions: Tensor | None = None,
    action_names: Sequence[str] | None = None,
    observation: Tensor | None = None,
    title: str | None = None,
    *,
    episode_starts: Sequence[int] = (),
    max_features: int = 16,
) -> Figure:
    """Relevance of each feature at each step, beside what the agent did and saw.

    Relevance has one diverging colour scale with zero in the middle, cut at the 99.5th percentile of its size. Bars
    give the mean over the steps of each action. Where there are more steps than room, a column shows the mean of
    several steps, how often each action was taken in them, and the range of each observation.

    Args:
        relevance: ``[time, features]``.
        features: one name per feature.
        actions: ``[time]``, index of the action taken at each step.
        action_names: one name per action; by default ``action 0`` and so on.
        observation: ``[time, features]``, drawn as one line per feature, each in a scale of its own.
        title: of the figure.
        episode_starts: steps at which an episode begins; marked by lines.
        max_features: how many rows are shown: those of largest mean absolute relevance; the rest is summed in one more.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no step, or shapes and names do not fit together.
    """
    relevance = finite(relevance, "relevance over time", "[time, features]", 2)
    features = require_names(features, relevance.shape[1], "features")
    time = len(relevance)
    taken = None if actions is None else actions.detach().cpu().reshape(-1).to(torch.int64)
    seen = None if observation is None else observation.detach().cpu().flatten(1).to(torch.float64)
    if taken is not None and len(taken) != time:
        raise ValueError(f"there are {len(taken)} actions for {time} steps")
    if seen is not None and seen.shape != relevance.shape:
        raise ValueError(
            f"the observation has shape {tuple(seen.shape)} and relevance {tuple(relevance.shape)}"
        )
    names = _action_names(taken, action_names)
    shown, labels, relevance = _largest(relevance, features, max_features)
    heights = {"actions": 0.4, "relevance": 0.2 + 0.42 * len(labels), "observation": 0.2 + 0.42 * len(shown)}
    if taken is None:
        del heights["actions"]
    if seen is None:
        del heights["observation"]
    figure: Figure = figure_class()(
        figsize=(11.0, max(3.0, 1.5 + sum(heights.values()))), layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[4.2, 1.0], height_ratios=list(heights.values()))
    cells = {name: (grid[row, 0], grid[row, 1]) for row, name in enumerate(heights)}

    heat = figure.add_subplot(cells["relevance"][0])
    timed = {"relevance": heat}
    image = _draw_relevance(heat, relevance, labels)
    bars = figure.add_subplot(cells["relevance"][1], sharey=heat)
    _draw_means(bars, relevance, taken, names)
    if taken is not None:
        timed["actions"] = figure.add_subplot(cells["actions"][0], sharex=heat)
        _draw_actions(timed["actions"], taken, len(names))
        _name_actions(figure.add_subplot(cells["actions"][1]), taken, names)
    if seen is None:
        draw_scale(figure, image, ax=bars)
    else:
        timed["observation"] = figure.add_subplot(cells["observation"][0], sharex=heat)
        _draw_observation(timed["observation"], seen[:, shown], [features[i] for i in shown])
        corner = figure.add_subplot(cells["observation"][1])
        corner.axis("off")
        inset = corner.inset_axes((0.0, 0.6, 1.0, 0.16 / heights["observation"]))
        draw_scale(figure, image, cax=inset)
    _draw_time(timed, time, episode_starts)
    draw_title(figure, title)
    return figure


def _action_names(taken: Tensor | None, names: Sequence[str] | None) -> list[str]:
    if taken is None:
        return []
    if int(taken.min()) < 0:
        raise ValueError("an action is an index, and one of them is negative")
    highest = int(taken.max())
    if names is None:
        return [f"action {i}" for i in range(highest + 1)]
    if highest >= len(names):
        raise ValueError(f"action {highest} was taken, and {len(names)} action names were given")
    return list(names)


def _largest(relevance: Tensor, features: Sequence[str], most: int) -> tuple[list[int], list[str], Tensor]:
    """Which features are shown, the names of the rows, and their relevance ``[time, rows]``."""
    count = relevance.shape[1]
    if count <= most:
        return list(range(count)), list(features), relevance
    shown = largest(relevance.abs().mean(0), most)
    rest = torch.ones(count, dtype=torch.bool)
    rest[shown] = False
    rows = torch.cat([relevance[:, shown], relevance[:, rest].sum(1, keepdim=True)], dim=1)
    return shown, [*(features[i] for i in shown), f"{count - most} others (sum)"], rows


def _columns(time: int) -> int:
    """How many steps share a column."""
    return max(1, time // _COLUMNS)


def _binned(values: Tensor) -> list[Tensor]:
    """``[time, ...]`` cut into columns, of which the last may be shorter."""
    return list(values.split(_columns(len(values))))


def _centres(time: int) -> list[float]:
    width = _columns(time)
    return [(start + min(start + width, time) - 1) / 2 for start in range(0, time, width)]


def _extent(time: int, rows: int) -> tuple[float, float, float, float]:
    return -0.5, time - 0.5, rows - 0.5, -0.5


def _draw_relevance(axes: Axes, relevance: Tensor, labels: Sequence[str]) -> AxesImage:
    columns = torch.stack([part.mean(0) for part in _binned(relevance)])
    top = top_of(columns)
    image = axes.imshow(
        columns.T.numpy(),
        aspect="auto",
        cmap=RELEVANCE_COLOURS,
        vmin=-top,
        vmax=top,
        interpolation="nearest",
        extent=_extent(len(relevance), len(labels)),
    )
    axes.set_yticks(range(len(labels)), list(map(verbatim, labels)))
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    steps = _columns(len(relevance))
    plain(axes, "relevance" if steps == 1 else f"relevance (mean of {steps} steps)")
    return image


def _draw_actions(axes: Axes, taken: Tensor, count: int) -> None:
    from matplotlib.colors import ListedColormap

    colours = [colour_of(i) for i in range(count)]
    if _columns(len(taken)) == 1:
        axes.imshow(
            taken[None].numpy(),
            aspect="auto",
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=count - 0.5,
            interpolation="nearest",
            extent=_extent(len(taken), 1),
        )
    else:
        one_hot = torch.nn.functional.one_hot(taken, count).to(torch.float64)
        shares = torch.stack([part.mean(0) for part in _binned(one_hot)], dim=1)
        axes.stackplot(_centres(len(taken)), shares.numpy(), baseline="zero", colors=colours)
        axes.set_ylim(0.0, 1.0)
    axes.set_yticks([sum(axes.get_ylim()) / 2], ["action"])
    plain(axes)


def _name_actions(axes: Axes, taken: Tensor, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    axes.axis("off")
    # Only what was done needs a colour explained; there may be many other actions.
    shown = sorted(set(taken.tolist()))[:12]
    handles = [Patch(color=colour_of(i)) for i in shown]
    columns = 1 + (len(handles) - 1) // 3
    draw_legend(axes, handles, [names[i] for i in shown], loc="center left", ncols=columns)


def _draw_means(axes: Axes, relevance: Tensor, taken: Tensor | None, names: Sequence[str]) -> None:
    groups = [(None, INK)] if taken is None else [(i, colour_of(i)) for i in sorted(set(taken.tolist()))]
    thickness = 0.72 / len(groups)
    for place, (action, colour) in enumerate(groups):
        mean = relevance.mean(0) if taken is None else relevance[taken == action].mean(0)
        offset = (place - (len(groups) - 1) / 2) * thickness
        axes.barh([i + offset for i in range(len(mean))], mean.tolist(), height=thickness * 0.9, color=colour)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.1)
    plain(axes, "mean" if taken is None else "mean by action")
    axes.tick_params(left=False, labelleft=False)


def _draw_observation(axes: Axes, observation: Tensor, labels: Sequence[str]) -> None:
    parts, centres = _binned(observation), _centres(len(observation))
    marker = "." if len(observation) < 40 else None
    for lane in range(observation.shape[1]):
        size = observation[:, lane].abs().max().item()
        # Rows count downwards, as in the picture of relevance above, and values upwards.
        unit = -0.42 / (size or 1.0)
        axes.axhline(lane, color=FAINT, linewidth=0.6, zorder=0)
        if len(parts) < len(observation):
            low = [lane + unit * part[:, lane].min().item() for part in parts]
            high = [lane + unit * part[:, lane].max().item() for part in parts]
            axes.fill_between(centres, low, high, color=FAINT, linewidth=0)
        means = [lane + unit * part[:, lane].mean().item() for part in parts]
        axes.plot(centres, means, color=INK, linewidth=0.9, marker=marker, markersize=4)
        beside = axes.get_yaxis_transform()
        axes.text(1.008, lane, f"±{size:.2g}", transform=beside, va="center", fontsize="x-small")
    axes.set_yticks(range(len(labels)), list(map(verbatim, labels)))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    plain(axes, "observation")


def _draw_time(timed: dict[str, Axes], time: int, episode_starts: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    last = timed.get("observation", timed["relevance"])
    for axes in timed.values():
        axes.set_xlim(-0.5, time - 0.5)
        for start in episode_starts:
            axes.axvline(start - 0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.tick_params(bottom=axes is last, labelbottom=axes is last)
    last.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    last.set_xlabel("step", fontsize="small", color=INK)
