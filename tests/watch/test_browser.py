"""The page in a real browser: it opens, moves, filters, stays on this machine, and shows what models wrote as text."""

import math
import re
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request

import pytest
from browsing import CHROMIUM, FLAGS, Tab, browser_or_skip, served
from recorded import completion, group, plain_groups, record, write_run

from posttrain.tracking.events import StepRecord

pytestmark = pytest.mark.browser

EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">{{ 7 * 7 }}'


@pytest.fixture(scope="module")
def browser():
    with browser_or_skip() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def hostile_groups(step):
    members = [completion(f"{EVIL} {place}", float(place), scores={"right": float(place), "<b>form</b>": 0.5}) for place in range(3)]
    return [*plain_groups(step), group(f"prompt {EVIL}", members)]


@pytest.fixture(scope="module")
def live(browser, tmp_path_factory):
    """(address, store) of a run that is being written; its completions are hostile."""
    directory = tmp_path_factory.mktemp("live") / "<b>run"
    directory.mkdir()
    store = write_run(directory, 12, groups=hostile_groups)
    store.note(7, "warning", f"the reward rose alone {EVIL}")
    with served(directory) as url:
        yield url, store
    store.close()


@pytest.fixture
def tab(browser, live):
    opened = Tab(browser)
    yield opened
    opened.check(live[0])


def pictures(page):
    return page.eval_on_selector_all(".pt-chart canvas", "all => all.map(one => one.toDataURL())")


def test_a_page_on_a_live_run_moves(tab, live):
    url, store = live
    tab.page.set_viewport_size({"width": 1200, "height": 6000})  # everything is in view
    page = tab.open(url)
    page.wait_for_selector("text=step 12 of 100")
    places = page.locator(".pt-chart-place").count()
    assert places >= 12
    page.wait_for_function(f"document.querySelectorAll('.pt-chart canvas').length === {places}")
    page.wait_for_timeout(300)
    before = pictures(page)
    store.write(record(13, hostile_groups(13)))
    page.wait_for_selector("text=step 13 of 100", timeout=5000)
    page.wait_for_timeout(500)
    after = pictures(page)
    assert len(after) == len(before)
    assert sum(old != new for old, new in zip(before, after, strict=True)) >= len(before) - 2


def test_charts_are_drawn_when_they_are_scrolled_to(tab, live):
    page = tab.open(live[0])
    page.wait_for_timeout(500)
    places, drawn = page.locator(".pt-chart-place").count(), page.locator(".pt-chart canvas").count()
    assert 0 < drawn < places
    for place in range(places):
        page.locator(".pt-chart-place").nth(place).scroll_into_view_if_needed()
        page.wait_for_function(f"document.querySelectorAll('.pt-chart-place')[{place}].querySelector('canvas') !== null")


def test_a_group_opens_and_tells_the_five_steps(tab, live):
    page = tab.open(f"{live[0]}?step=5")
    titles = page.locator(".pt-stage .pt-h3").all_text_contents()
    assert titles == ["Sample", "Score", "Compare within the group", "Clipped update", "No value model"]
    assert page.locator(".pt-prompt").text_content() == "What is 5+1?"
    page.locator(".pt-group").nth(2).click()
    page.wait_for_function("document.querySelector('.pt-prompt').textContent === 'Be brief.'")
    texts = [text.strip() for text in page.locator(".pt-tokens").all_text_contents()]
    assert texts == ["no", "no.", "never", "yes, and on and on"]  # best first
    assert page.locator(".pt-completion .pt-badge.down", has_text="cut").count() == 1


def test_tokens_take_the_colour_that_is_asked_for(tab, live):
    page = tab.open(f"{live[0]}?step=5&group=0")
    first = page.locator(".pt-tokens span").nth(3)
    by_advantage = first.get_attribute("style")
    page.locator(".pt-modes").get_by_text("entropy").click()
    page.wait_for_function(f"document.querySelectorAll('.pt-tokens span')[3].getAttribute('style') !== {by_advantage!r}")
    assert "entropy 0.7" in first.get_attribute("title")


def test_filters_keep_what_they_say(tab, live):
    page = tab.open(f"{live[0]}?step=5")
    assert page.locator(".pt-group").count() == 5
    for kind, prompt in {"truncated": "Be brief.", "no signal": "Say a number.", "reward alarm": "Odd one."}.items():
        box = page.locator(".q-checkbox", has_text=kind)
        box.click()
        page.wait_for_function("document.querySelectorAll('.pt-group').length === 1")
        assert page.locator(".pt-prompt").text_content() == prompt
        box.click()
        page.wait_for_function("document.querySelectorAll('.pt-group').length === 5")


def test_words_are_found_in_later_steps(tab, live):
    page = tab.open(f"{live[0]}?step=2")
    page.get_by_placeholder("text in prompts and answers").fill("what is 9+1")
    page.wait_for_selector("text=No group of this step is like that")
    page.get_by_role("button", name="find next").click()
    page.wait_for_function("(document.querySelector('.pt-prompt') || {}).textContent === 'What is 9+1?'")


def test_the_steps_can_be_walked(tab, live):
    page = tab.open(f"{live[0]}?step=4")
    page.locator("button", has_text="chevron_right").click()
    page.wait_for_function("document.querySelector('.pt-prompt').textContent === 'What is 5+1?'")
    page.locator("button", has_text="chevron_left").click()
    page.locator("button", has_text="chevron_left").click()
    page.wait_for_function("document.querySelector('.pt-prompt').textContent === 'What is 3+1?'")


def test_steps_that_are_passed_at_once_leave_no_errors(tab, live):
    """A group may be gone before the browser has drawn it."""
    page = tab.open(f"{live[0]}?step=2")
    for direction, prompt in {"right": "What is 10+1?", "left": "What is 2+1?"}.items():
        page.evaluate(
            "async label => { for (let i = 0; i < 8; i++) {"
            " [...document.querySelectorAll('button')].find(one => one.textContent.includes(label)).click();"
            " await new Promise(done => setTimeout(done, 15)) } }",
            f"chevron_{direction}",
        )
        page.wait_for_function(f"(document.querySelector('.pt-prompt') || {{}}).textContent === {prompt!r}")


def test_what_a_model_wrote_stays_text(tab, live):
    page = tab.open(f"{live[0]}?step=5&group=4")
    assert page.locator(".pt-prompt").text_content() == f"prompt {EVIL}"
    assert page.locator(".pt-tokens").first.text_content() == f"{EVIL} 2"
    page.get_by_role("tab", name="Notes").click()
    page.wait_for_selector(".pt-note")
    assert EVIL in page.locator(".pt-note").first.text_content()
    page.get_by_role("tab", name="Overview").click()
    page.wait_for_selector("text=<b>run")
    page.mouse.move(300, 400)  # over a chart: its tooltip names the components
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src='x'], b").count() == 0


@pytest.mark.parametrize("where", ["", "?step=5&group=4"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser, live, where):
    tab = Tab(browser, width=400, height=800)
    page = tab.open(live[0] + where)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    boxes = page.eval_on_selector_all(".pt-card, .pt-group, .pt-figure, .q-tab, button", "all => all.map(one => one.getBoundingClientRect().right)")
    assert max(boxes) <= 400
    tab.check(live[0])


@pytest.mark.parametrize(("scheme", "is_dark"), [("dark", True), ("light", False)])
def test_the_ground_is_as_the_system_wants_it(browser, live, scheme, is_dark):
    tab = Tab(browser, color_scheme=scheme)
    page = tab.open(live[0])
    red, green, blue = (int(part) for part in page.evaluate("getComputedStyle(document.body).backgroundColor")[4:-1].split(",")[:3])
    assert (red + green + blue < 150) == is_dark
    tab.check(live[0])


def test_runs_are_drawn_over_each_other_and_one_may_begin_later(browser, tmp_path):
    for name, steps in (("one", 3), ("two", 5)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, steps).close()
    with served("--wait", tmp_path / "one", tmp_path / "two", tmp_path / "three") as url:
        tab = Tab(browser)
        page = tab.open(url)
        page.wait_for_selector("text=has not begun")
        (tmp_path / "three").mkdir()
        store = write_run(tmp_path / "three", 9)
        page.wait_for_selector("text=step 9 of 100", timeout=6000)
        assert page.locator("text=has not begun").count() == 0
        tab.check(url)
        store.close()


def test_a_token_is_asked_for_and_then_out_of_sight(browser, tmp_path):
    write_run(tmp_path, 3).close()
    with served("--token", tmp_path) as url:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url.partition("?")[0])
        tab = Tab(browser)
        page = tab.open(url)
        page.wait_for_selector("text=step 3 of 100")
        assert "token" not in page.url
        tab.check(url)


# Writes a step, then dies in the middle of the next: with a cache this small, half of it is in the write-ahead log already.
DIES = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from recorded import plain_groups, write_run
store = write_run(Path(sys.argv[1]), 6)
store._db.execute("PRAGMA cache_size = 2")
with store._transaction() as db:
    db.executemany("INSERT INTO rollouts VALUES (7, 0, ?, 1.0, 0.0, 'stop', 0, 2, '{}', ?)", [(place, "x" * 5000) for place in range(200)])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_whose_writer_was_killed_in_mid_transaction_opens(browser, tmp_path, request):
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(DIES), str(tmp_path), str(request.config.rootpath / "tests")])
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / "run.sqlite-wal").stat().st_size > 500_000
    with served(tmp_path) as url:
        tab = Tab(browser)
        page = tab.open(f"{url}?step=7")
        page.wait_for_selector("text=step 6 of 100")
        assert page.locator(".pt-prompt").text_content() == "What is 6+1?"
        tab.check(url)


def test_a_metric_that_is_called_like_a_panel_has_a_chart_of_its_own_and_gaps_are_told_when_they_come(browser, tmp_path):
    store = write_run(tmp_path, 3)
    store.write(StepRecord(3, {"KL": 5.0, "Reward": 7.0}))
    with served(tmp_path) as url:
        tab = Tab(browser, height=6000)
        page = tab.open(url)
        page.wait_for_selector("text=step 3 of 100")
        titles = page.locator(".pt-card .pt-h3").all_text_contents()
        assert (titles.count("KL"), titles.count("Reward")) == (2, 2)
        places = page.locator(".pt-chart-place").count()
        page.wait_for_function(f"document.querySelectorAll('.pt-chart canvas').length === {places}")
        page.wait_for_timeout(300)
        kl, other = (page.locator(".pt-card", has=page.locator(".pt-h3", has_text=re.compile("^KL$"))).nth(place) for place in (0, 1))
        assert kl.locator("canvas").evaluate("one => one.toDataURL()") != other.locator("canvas").evaluate("one => one.toDataURL()")
        assert "not finite" not in kl.locator(".pt-caption").text_content()
        store.write(StepRecord(4, {"kl": math.nan}))
        page.wait_for_selector("text=One value was not finite: a gap.", timeout=5000)
        assert kl.locator(".pt-caption").text_content().endswith("leaving what it was. One value was not finite: a gap.")
        tab.check(url)
    store.close()
