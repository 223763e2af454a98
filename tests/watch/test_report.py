"""The report: one file, everything escaped, no network; and its charts are really drawn."""

import re

import pytest
from browsing import CHROMIUM, FLAGS, browser_or_skip
from recorded import group, plain_groups, rollout, write_run

from posttrain.errors import UserError
from posttrain.watch.curves import Run
from posttrain.watch.report import _library, chosen_groups, render, write_report

EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'

pytest.importorskip("nicegui", reason="the report takes its chart library from nicegui: pip install 'posttrain[watch]'")


def groups(step):
    members = [rollout(f"{EVIL} {place}", float(place), scores={EVIL: float(place)}) for place in range(3)]
    return [*plain_groups(step), group(f"prompt {EVIL}", members)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    store = write_run(directory, 8, groups=groups, meta={"config": {"output_dir": EVIL, "max_steps": 8, "hub_token": "secret"}})
    store.note(3, "warning", EVIL)
    store.close()
    run = Run("r", directory)
    run.refresh()
    return run


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
