"""Charts as dictionaries: the numbers that were logged, in the units that are written, and no text that could act."""

import json
import math

import pytest
from recorded import completion, group, write_run

from posttrain.tracking.events import RunStore, StepRecord
from posttrain.watch import charts as drawing
from posttrain.watch.curves import WatchedRun
from posttrain.watch.panels import charts


def run_of(directory, columns, name="r"):
    """A run that logged `columns`: name -> values from step 1 on."""
    directory.mkdir(exist_ok=True)
    store = RunStore(directory / "run.sqlite")
    for place in range(max(map(len, columns.values()))):
        store.write(StepRecord(place + 1, {key: values[place] for key, values in columns.items() if place < len(values)}))
    store.close()
    run = WatchedRun(name, directory)
    run.refresh()
    return run


def drawn(*runs):
    return {chart.panel.title: drawing.option(chart, runs) for chart in charts(sorted({name for run in runs for name in run.names}))}


def lines(option):
    return {series["name"]: series["data"] for series in option["series"] if not series.get("silent")}


def test_a_curve_has_the_logged_values_at_their_steps(tmp_path):
    options = drawn(run_of(tmp_path, {"reward": [1.5, -2.25, math.nan, 4.0], "loss": [1e-7, 123456.0]}))
    assert lines(options["Reward"]) == {"reward": [[1, 1.5], [2, -2.25], [3, None], [4, 4.0]]}
    assert lines(options["Loss"]) == {"loss": [[1, 1e-7], [2, 123460.0]]}  # five digits are sent


def test_shares_are_percents_and_dead_groups_turn_into_groups_with_a_signal(tmp_path):
    options = drawn(run_of(tmp_path, {"frac_reward_zero_std": [0.25, 1.0], "solved": [0.5, 0.75]}))
    assert lines(options["Groups with a signal"]) == {"with signal": [[1, 75.0], [2, 0.0]]}
    assert lines(options["Solved"]) == {"solved": [[1, 50.0], [2, 75.0]]}
    assert options["Solved"]["yAxis"]["axisLabel"]["formatter"] == "{value} %"


def test_several_runs_are_one_colour_each_and_drawn_over_each_other(tmp_path):
    columns = {"completions/mean_length": [1.0, 2.0], "completions/max_length": [3.0, 4.0], "completions/mean_terminated_length": [1.0, 1.0]}
    first, second = (run_of(tmp_path / name, columns, name) for name in ("one", "two"))
    series = drawn(first, second)["Length of completions"]["series"]
    assert [line["name"] for line in series] == ["one: mean", "one: ended", "two: mean", "two: ended"]  # the longest is a detail
    assert len({line["color"] for line in series}) == 2
    assert [line["lineStyle"]["type"] for line in series] == ["solid", "dashed", "solid", "dashed"]
    assert lines(drawn(run_of(tmp_path / "three", {"reward": [1.0]}, "three"), first)["Reward"]) == {"three": [[1, 1.0]]}


def test_the_parts_of_a_step_and_the_rest_add_up_to_the_whole(tmp_path):
    columns = {"time/collect": [1.0, 2.0], "time/update": [0.5, 0.5, 0.5], "step_time": [2.0, 2.75, 0.75]}  # the last step collects nothing
    option = drawn(run_of(tmp_path, columns))["Where a step's time goes"]
    assert lines(option) == {
        "collect": [[1, 1.0], [2, 2.0], [3, 0.0]],
        "update": [[1, 0.5], [2, 0.5], [3, 0.5]],
        "the rest": [[1, 0.5], [2, 0.25], [3, 0.25]],
    }
    assert {series["stack"] for series in option["series"]} == {"all"}


def test_in_a_long_run_too_the_parts_add_up_to_the_whole(tmp_path):
    """Rollouts feed two updates, so every other log has no `collect`; all curves are longer than a screen."""
    store = RunStore(tmp_path / "run.sqlite")
    for step in range(1, 1001):
        collect = {"time/collect": 3.0} if step % 2 else {}
        store.write(StepRecord(step, {"time/update": 1.0, "step_time": 1.5 + (3.0 if collect else 0.0)} | collect))
    store.close()
    run = WatchedRun("r", tmp_path)
    run.refresh()
    parts = lines(drawn(run)["Where a step's time goes"])
    for (_, collect), (_, update), (_, rest) in zip(parts["collect"], parts["update"], parts["the rest"], strict=True):
        assert (collect, update) == (1.5, 1.0)
        assert rest == pytest.approx(0.5, abs=0.51)  # three or four steps a point: one rollout more or less
    assert sum(rest for _, rest in parts["the rest"]) / len(parts["the rest"]) == pytest.approx(0.5, abs=0.05)


def test_a_long_curve_has_a_band_from_its_least_to_its_most(tmp_path):
    values = [float(step % 10) for step in range(1000)]
    option = drawn(run_of(tmp_path, {"frac_reward_zero_std": [value / 10 for value in values]}))["Groups with a signal"]
    floor, height, mean = option["series"]
    assert len(mean["data"]) <= 300
    for (step, low), (_, more), (_, middle) in zip(floor["data"], height["data"], mean["data"], strict=True):
        assert low - 1e-3 <= middle <= low + more + 1e-3, step
    assert max(low + more for (_, low), (_, more) in zip(floor["data"], height["data"], strict=True)) == pytest.approx(100.0, abs=0.01)


def test_warnings_are_marked_where_they_were_said(tmp_path):
    store = write_run(tmp_path, 5, groups=lambda step: [])
    store.note(3, "warning", "the reward rose alone")
    run = WatchedRun("r", tmp_path)
    run.refresh()
    option = drawing.option(charts(run.names)[0], [run], marks=True)
    assert option["series"][-1]["markLine"]["data"] == [{"xAxis": 3}]


def test_a_group_is_drawn_at_its_rewards_with_mean_and_deviation(tmp_path):
    members = [completion("a", 1.0), completion("b", 3.0), completion("c", None), completion("d", 2.0)]
    store = write_run(tmp_path, 1, groups=lambda step: [group("q", members)])
    store.close()
    run = WatchedRun("r", tmp_path)
    run.refresh()
    (row,) = run.browser.groups(1)
    option = drawing.comparison(run.browser.completions(1, 0), row.mean, row.std)
    (points,) = option["series"]
    assert [point["value"] for point in points["data"]] == [["#0", 1.0], ["#1", 3.0], ["#3", 2.0]]
    assert [point["itemStyle"]["color"] for point in points["data"]] == [drawing.DOWN, drawing.UP, drawing.GREY]
    assert points["markLine"]["data"] == [{"yAxis": 2.0}]
    assert points["markArea"]["data"] == [[{"yAxis": 1.0}, {"yAxis": 3.0}]]


def test_a_group_without_spread_takes_away_what_the_one_before_had(tmp_path):
    """One chart shows group after group, and what its new options do not name would stay."""
    write_run(
        tmp_path, 1, groups=lambda step: [group("q", [completion("a", 1.0), completion("b", 3.0)]), group("r", [completion("c", None)])]
    ).close()
    run = WatchedRun("r", tmp_path)
    run.refresh()
    spread, silent = (drawing.comparison(run.browser.completions(1, row.group), row.mean, row.std) for row in run.browser.groups(1))
    assert set(walk(spread["yAxis"])) == set(walk(silent["yAxis"]))
    assert silent["series"][0]["markLine"]["data"] == silent["series"][0]["markArea"]["data"] == []
    assert silent["yAxis"]["min"] is silent["yAxis"]["max"] is None


def test_no_text_of_an_option_can_act(tmp_path):
    evil = "<img src=x onerror=alert(1)>\u202e"
    run = run_of(tmp_path, {f"rewards/{evil}/mean": [1.0, 2.0], "rewards/b/mean": [0.0, 1.0]}, name=evil)
    for option in drawn(run).values():
        assert option["tooltip"]["renderMode"] == "richText"  # the library's other mode builds HTML of names
        assert json.loads(json.dumps(option, allow_nan=False)) == option
        assert not [key for key in walk(option) if key.startswith(":")]  # such keys would be read as JavaScript
        assert "\u202e" not in json.dumps(option, ensure_ascii=False)


def walk(value):
    """Every key in a nest of dictionaries and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)
