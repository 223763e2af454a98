"""Charts as ECharts options: plain dictionaries, which the live page and the report hand to the same library.

Nothing here is read as markup: tooltips are drawn on the canvas (`richText`), and texts of strangers are names and
labels only. Grey texts and lines are of a tone that can be read on white and on black, so a chart need not know which
it stands on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.characters import visible
from posttrain.tracking.reader import CompletionRow, Point
from posttrain.watch.curves import WatchedRun
from posttrain.watch.panels import Chart, Curve

Option = dict[str, Any]

COLOURS = ("#3f83dd", "#e08a12", "#1f9e77", "#c8559f", "#8b72d6", "#cf5747", "#3fa5bd", "#94912b")  # told apart by the colour-blind, on both grounds
GREY, FAINT = "#7d8590", "rgba(125,133,144,0.22)"
UP, DOWN = "#139a74", "#d9622b"  # advantage above 0, below 0
DASHES = ("solid", "dashed", "dotted")
FARTHEST = 1e100  # larger values are drawn as this one
MARKED = ("warning", "resume", "reward", "env", "cap")  # notes that stand as lines in the first chart


def option(chart: Chart, runs: Sequence[WatchedRun], *, marks: bool = False) -> Option:
    """One run: a colour for each curve. Several: a colour for each run, and the curves differ by their dashes."""
    series: list[Option] = []
    curves = chart.curves if len(runs) == 1 else tuple(curve for curve in chart.curves if not curve.is_detail) or chart.curves
    for place, run in enumerate(runs):
        for number, curve in enumerate(curves):
            points = run.curve(curve.metric)
            if not points:
                continue
            alone = len(runs) == 1
            colour = COLOURS[(number if alone else place) % len(COLOURS)]
            name = visible(curve.label if alone else run.name if len(curves) == 1 else f"{run.name}: {curve.label}")
            dash = ("dashed" if curve.is_held_out else "solid") if alone else DASHES[number % len(DASHES)]
            if alone and number == 0 and not chart.panel.is_stacked:
                series += _band(curve, points, colour, chart.panel.unit)
            series.append(_line(curve, points, name, colour, dash, chart.panel.unit))
            if chart.panel.is_stacked and alone:
                series[-1] |= _layer(colour, _seconds(points, _clock(run, curves)))
    if chart.panel.is_stacked and len(runs) == 1:
        series += _rest(curves, runs[0])
    if marks and len(runs) == 1 and series:
        series[-1]["markLine"] = _marks(runs[0])
    named = [line["name"] for line in series if not line.get("silent")]
    return _frame(series, named, chart.panel.unit, from_zero=chart.panel.is_stacked or chart.panel.unit == "%")


def _frame(series: list[Option], named: list[str], unit: str, *, from_zero: bool = False) -> Option:
    has_legend = len(named) > 1
    axis: Option = {
        "axisLabel": {"color": GREY, "fontSize": 11},
        "axisLine": {"onZero": False, "lineStyle": {"color": GREY}},
        "splitLine": {"lineStyle": {"color": FAINT}},
    }
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 6, "right": 14, "top": 34 if has_legend else 12, "bottom": 4, "containLabel": True},
        "legend": {
            "show": has_legend,
            "type": "scroll",
            "top": 0,
            "data": named,
            "icon": "roundRect",
            "itemWidth": 14,
            "itemHeight": 4,
            "textStyle": {"color": GREY},
            "pageTextStyle": {"color": GREY},
        },
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True, "axisPointer": {"type": "line"}},
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", **axis, "splitLine": {"show": False}, "minInterval": 1},
        "yAxis": {"type": "value", "scale": not from_zero, **axis, "axisLabel": {**axis["axisLabel"], "formatter": f"{{value}} {unit}".rstrip()}},
        "series": series,
    }


def _line(curve: Curve, points: Sequence[Point], name: str, colour: str, dash: str, unit: str) -> Option:
    say = _scale(curve, unit)
    style = {"color": colour, "width": 1 if curve.is_detail else 1.8, "type": dash, "opacity": 0.7 if curve.is_detail else 1.0}
    data = [[point.step, _rounded(say, point.mean)] for point in points]
    return {
        "type": "line",
        "name": name,
        "data": data,
        "showSymbol": len(points) < 3 or curve.is_held_out,
        "symbolSize": 5,
        "color": colour,
        "lineStyle": style,
    }


def _band(curve: Curve, points: Sequence[Point], colour: str, unit: str) -> list[Option]:
    """From the least to the most of what each point stands for: a floor that is not seen, and what lies on it."""
    if all(point.count == 1 for point in points):
        return []
    say = _scale(curve, unit)
    floor, height = [], []
    for point in points:
        ends = [_rounded(say, end) for end in (point.low, point.high)]
        low, high = (min(ends), max(ends)) if None not in ends else (None, None)  # type: ignore[type-var]
        floor.append([point.step, low])
        height.append([point.step, None if low is None or high is None else _short(high - low)])
    unseen: Option = {"type": "line", "silent": True, "showSymbol": False, "stack": "band", "stackStrategy": "all", "lineStyle": {"opacity": 0}}
    unseen |= {"tooltip": {"show": False}, "color": colour}
    return [
        unseen | {"name": "least", "data": floor},
        unseen | {"name": "most", "data": height, "areaStyle": {"color": colour, "opacity": 0.16}},
    ]


def _clock(run: WatchedRun, curves: Sequence[Curve]) -> Sequence[Point]:
    """The points that a stack stands on: whole steps where they were logged."""
    return run.curve("step_time") or max((run.curve(curve.metric) for curve in curves), key=len)


def _seconds(points: Sequence[Point], clock: Sequence[Point]) -> dict[int, float]:
    """A layer at the points of `clock`. What was not logged at a step took no time there: rollouts that feed several
    updates, say.

    Where points stand for many values, those of two curves need not end at the same step: then a point holds for all
    steps up to its own, and something that every other log says counts half.
    """
    if all(point.count == 1 for point in (*points, *clock)):
        known = {point.step: point.mean or 0.0 for point in points}
        return {tick.step: known.get(tick.step, 0.0) for tick in clock}
    share = min(1.0, sum(point.count for point in points) / sum(tick.count for tick in clock))
    steps = [point.step for point in points]
    return {tick.step: share * (points[min(bisect_left(steps, tick.step), len(points) - 1)].mean or 0.0) for tick in clock}


def _layer(colour: str, values: dict[int, float]) -> Option:
    data = [[step, _short(value)] for step, value in values.items()]
    return {"data": data, "stack": "all", "areaStyle": {"opacity": 0.45}, "lineStyle": {"width": 0.5, "color": colour}}


def _rest(curves: Sequence[Curve], run: WatchedRun) -> list[Option]:
    """What of a step's time no curve accounts for."""
    clock = run.curve("step_time")
    layers = [_seconds(run.curve(curve.metric), clock) for curve in curves if run.curve(curve.metric)]
    rest = {tick.step: max((tick.mean or 0.0) - sum(layer[tick.step] for layer in layers), 0.0) for tick in clock}
    if not rest:
        return []
    line = {"type": "line", "name": "the rest", "showSymbol": len(rest) < 3, "symbolSize": 5, "color": GREY}
    return [line | _layer(GREY, rest)]


def _marks(run: WatchedRun) -> Option:
    steps = sorted({note.step for note in run.notes if note.kind in MARKED})[:50]
    style = {"color": DOWN, "type": "dashed", "opacity": 0.6}
    return {"silent": True, "symbol": "none", "label": {"show": False}, "lineStyle": style, "data": [{"xAxis": step} for step in steps]}


def comparison(rows: Sequence[CompletionRow], mean: float | None, std: float | None) -> Option:
    """A group against itself: every completion at its reward, the mean as a line, one deviation to both sides as a
    band.

    It names everything, also what is not there: a chart that is given the options of another group keeps what they do
    not name.
    """
    scored = [(row, row.reward) for row in rows if row.reward is not None]
    frame = _frame([], [], "")
    axis = {"axisLabel": {"color": GREY, "fontSize": 11}, "axisTick": {"show": False}, "axisLine": {"show": False}}
    frame["xAxis"] = {"type": "category", "data": [f"#{row.key.completion}" for row, _ in scored], **axis}
    frame["tooltip"]["trigger"] = "item"
    data = [{"value": [f"#{row.key.completion}", _short(reward)], "itemStyle": {"color": sign_colour(row.advantage)}} for row, reward in scored]
    points: Option = {"type": "scatter", "name": "reward", "data": data, "symbolSize": 13, "markLine": {"data": []}, "markArea": {"data": []}}
    least = most = round_ends = None
    if mean is not None:
        label = {"formatter": f"mean {mean:.3g}", "color": GREY, "position": "insideEndTop"}
        line = {"silent": True, "symbol": "none", "lineStyle": {"color": GREY, "type": "solid"}, "label": label, "data": [{"yAxis": mean}]}
        points["markLine"] = line
    if mean is not None and std:
        ends = [reward for _, reward in scored] + [mean - std, mean + std]
        margin = 0.06 * (max(ends) - min(ends))
        least, most, round_ends = _short(min(ends) - margin), _short(max(ends) + margin), False
        points["markArea"] = {"silent": True, "itemStyle": {"color": FAINT}, "data": [[{"yAxis": _short(mean - std)}, {"yAxis": _short(mean + std)}]]}
    frame["yAxis"] |= {"min": least, "max": most}
    frame["yAxis"]["axisLabel"] |= {"showMinLabel": round_ends, "showMaxLabel": round_ends}
    frame["series"] = [points]
    return frame


def sign_colour(value: float) -> str:
    return UP if value > 0 else DOWN if value < 0 else GREY


def caption(chart: Chart, runs: Sequence[WatchedRun]) -> str:
    """What the panel says of itself, and how many values were NaN or infinite: gaps in its curves."""
    missing = sum(point.not_finite for run in runs for curve in chart.curves for point in run.curve(curve.metric))
    gaps = f"{missing:,} values were not finite: gaps." if missing > 1 else "One value was not finite: a gap." if missing else ""
    return f"{chart.panel.caption} {gaps}".strip()


def _scale(curve: Curve, unit: str) -> Callable[[float], float]:
    factor = 100.0 if unit == "%" else 1.0
    return (lambda value: factor * (1.0 - value)) if curve.is_complement else (lambda value: factor * value)


def _rounded(say: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else _short(say(value))


def _short(value: float) -> float:
    value = min(max(value, -FARTHEST), FARTHEST) if value == value else 0.0  # what JSON lacks reaches no page
    return float(f"{value:.5g}")  # a screen shows no more, and a page is sent faster
