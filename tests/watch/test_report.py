"""The report: one file, everything escaped, no network; and its charts are really drawn."""

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import CHROMIUM, FLAGS, browser_or_skip
from recorded import completion, group, plain_groups, write_run

from posttrain.errors import UserError
from posttrain.tracking.events import StepRecord
from posttrain.watch.curves import WatchedRun
from posttrain.watch.report import _library, chosen_groups, render, write_report

EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'

pytest.importorskip("nicegui", reason="the report takes its chart library from nicegui: pip install 'posttrain[watch]'")


def groups(step):
    members = [completion(f"{EVIL} {place}", float(place), scores={EVIL: float(place)}) for place in range(3)]
    return [*plain_groups(step), group(f"prompt {EVIL}", members)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    store = write_run(directory, 8, groups=groups, meta={"config": {"output_dir": EVIL, "max_steps": 8, "hub_token": "secret"}})
    store.note(3, "warning", EVIL)
    store.close()
    run = WatchedRun("r", directory)
    run.refresh()
    return run


def begun(directory):
    run = WatchedRun("r", directory)
    run.refresh()
    return run


def rendered(directory):
    """Without the library, which has a say of its own about control characters."""
    return render(begun(directory)).replace(_library()[0], "")


def test_texts_are_escaped_everywhere(run):
    html = render(run).replace(_library()[0], "")  # the library itself knows how to write an image
    assert EVIL not in html
    assert "window.hacked = 1</script>" not in html
    assert "<img" not in html
    assert html.count("&lt;/script&gt;&lt;script&gt;window.hacked = 1") > 5
    assert "secret" not in html


def test_the_file_names_no_other_place(run):
    html = render(run)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
    assert "default-src 'none'" in html


def test_groups_are_those_asked_for_or_the_most_telling_of_beginning_middle_and_end(run):
    assert [step for step, _ in chosen_groups(run)] == [1, 4, 8]
    for step, number in chosen_groups(run):
        spreads = {row.group: row.std or 0.0 for row in run.browser.groups(step)}
        assert spreads[number] == max(spreads.values())
    html = render(run, groups=[(5, 2)])
    assert "Step 5, group 2" in html
    assert ">Be brief.<" in html
    assert html.count("Step ") == 1
    with pytest.raises(UserError, match="the nearest step with groups is 8, with 5 of them"):
        render(run, groups=[(99, 0)])


def test_what_moves_cursors_or_reorders_text_is_written_out(tmp_path):
    hidden = "a\u202eb\x1b[2J\nc"
    store = write_run(tmp_path, 2, meta={"config": {hidden: 1}})
    store.write(StepRecord(2, {hidden: 1.0}))
    store.note(2, hidden, hidden)
    store.close()
    html = rendered(tmp_path)
    assert html.count("a\\u202eb\\x1b[2J\\nc") >= 3  # the kind of the note, the chart's title, the setting
    assert "a\\u202eb\\x1b[2J\nc</div>" in html  # lines of a note stay lines
    assert not re.search("[\u202e\x1b]", html)


def test_settings_are_left_out_by_name_and_not_by_chance(tmp_path):
    told = {"max_tokens_per_micro_batch": 4321, "max_turn_tokens": 4322, "record_tokens_of": 4323, "temperature": 4324}
    untold = {
        "output_dir": "/home/me",
        "hub_token": "x",
        "push_to_hub_model_id": "x",
        "tpu_num_cores": 9,
        "fsdp_config": {"a": 1},
        "ddp_timeout": 1800,
    }
    write_run(tmp_path, 1, meta={"config": told | untold}).close()
    html = rendered(tmp_path)
    assert {name for name in told | untold if f"<td>{name}</td>" in html} == told.keys()


def test_gaps_are_told_under_the_title(tmp_path):
    store = write_run(tmp_path, 3)
    store.write(StepRecord(3, {"kl": math.nan}))
    store.close()
    html = rendered(tmp_path)
    assert html.count("One value was not finite: a gap.") == 1
    assert "leaving what it was. One value" in html


def test_a_report_is_written_whole_or_not_at_all(run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("an earlier one")
    with pytest.raises(UserError):
        write_report(run, path, groups=[(99, 0)])
    assert path.read_text() == "an earlier one"
    with path.open() as opened:
        write_report(run, path)
        assert opened.read() == "an earlier one"  # who has it open keeps what he had
    assert path.read_text().startswith("<!doctype html>")
    assert [left.name for left in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a path that is no plain file")
def test_a_report_goes_into_a_pipe_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write_run(tmp_path, 1).close()
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_report(begun(tmp_path), tmp_path / "pipe")
        assert read.result(timeout=20).startswith("<!doctype html>")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.browser
def test_opened_without_a_network_it_draws_every_chart_and_nothing_acts(run, tmp_path):
    write_report(run, tmp_path / "report.html")
    with browser_or_skip() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(offline=True)
        page = context.new_page()
        errors, asked = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_selector("body[data-drawn=yes]")
        charts = page.locator("[data-chart]").count()
        assert charts > 12
        assert page.locator("[data-chart] canvas").count() == charts
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        assert page.locator(".pt-prompt").first.text_content() == f"prompt {EVIL}"
        assert errors == []
        assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []
        page.set_viewport_size({"width": 400, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
