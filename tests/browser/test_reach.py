"""The dashboard with twelve consumers, a long name and thirty waiting jobs: everything in reach at
every width, no two consumers alike, and nothing that axe-core objects to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.browser.conftest import Page, violations
from tests.support import colours
from tests.support.scene import CROWD, LONG_NAME, Scene, crowd

pytest.importorskip("playwright")
pytestmark = pytest.mark.timeout(180)

WIDTHS = [390, 820, 1280, 1440]
WAITING = 30

OUT_OF_REACH = """() => {
  const found = [], wide = document.documentElement.clientWidth;
  const seen = (el) => {
    const box = el.getBoundingClientRect();
    return box.width > 1 && box.height > 1;
  };
  const clips = (el) => !["visible"].includes(getComputedStyle(el).overflowX);
  const texts = [];
  for (const el of document.querySelectorAll("body *")) {
    if (el.checkVisibility() && seen(el) && clips(el) && el.scrollWidth > el.clientWidth + 1) {
      found.push(`scrolls sideways: ${el.id || el.tagName}`);
    }
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility({visibilityProperty: true})) continue;
    if (["TITLE", "SCRIPT", "OPTION", "title"].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.width <= 1) continue;
    texts.push(...[...range.getClientRects()].map((line) => [line, node]));
    if (box.left < 0 || box.right > wide + 0.5) found.push(`off the page: ${node.textContent}`);
    for (let el = parent; el && el !== document.body; el = el.parentElement) {
      if (!clips(el) || !seen(el)) continue;
      const frame = el.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) {
        found.push(`cut by ${el.id || el.tagName}: ${node.textContent}`);
      }
    }
  }
  // Only what shows in its box: what is scrolled out of sight lies beneath what follows the box.
  const inSight = ([line, node]) => {
    for (let el = node.parentElement; el && el !== document.body; el = el.parentElement) {
      const frame = el.getBoundingClientRect();
      if (clips(el) && (line.bottom > frame.bottom + 1 || line.top < frame.top - 1)) return false;
    }
    return !node.parentElement.closest("#said-box, caption, thead");
  };
  const lines = texts.filter(inSight);
  lines.forEach(([one, node], i) => lines.slice(i + 1).forEach(([other, next]) => {
    const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const high = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    if (node !== next && wide > 2 && high > 5) {
      found.push(`on top of each other: ${node.textContent} | ${next.textContent}`);
    }
  }));
  for (const button of document.querySelectorAll("button, select, input")) {
    if (!button.checkVisibility() || !seen(button)) continue;
    button.scrollIntoView({block: "center"});
    window.scrollTo(0, window.scrollY);  // a page that has to be pushed sideways does not count
    const box = button.getBoundingClientRect();
    for (const [x, y] of [[box.left + 3, box.top + 3], [box.right - 3, box.bottom - 3]]) {
      if (document.elementFromPoint(x, y) !== button) {
        const name = button.getAttribute("aria-label") || button.textContent || button.value;
        found.push(`cannot be pressed: ${name}`);
      }
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def busy() -> Iterator[Scene]:
    with crowd() as it:
        for name in list(CROWD)[:8]:
            assert it.broker.post(f"/v1/consumers/{name}/load").status_code == 200
        it.pace(**dict.fromkeys(CROWD, 300))
        it.jobs("llm", 1)
        for _ in range(WAITING // 3):
            for kind in ("image", "tts", "stt"):
                it.jobs(kind, 1)
        yield it
        for entry in reversed(it.broker.broker.card.scheduler.queue()):
            it.broker.delete(f"/v1/queue/{entry.ticket}")


def shown(opened: Callable[..., Page], scene: Scene, **options: Any) -> Page:
    page = opened(scene.broker.url, **options)
    settled(page)
    return page


def settled(page: Page) -> None:
    page.wait("#state", "live")
    page.wait("#services tr", "xtts")
    page.wait("#h-queue", f"{WAITING} wait")
    page.page.locator("#chart text", has_text="whisper").wait_for()


def worst(route: Any) -> None:
    """Everything that makes text longer, at once."""
    status = route.fetch().json()
    for entry in status["queue"]:
        entry |= {
            "overdue": True,
            "age_ms": 599_000,
            "estimate_ms": 3_000_000,
            "client": "a-client",
        }
    for consumer in status["consumers"]:
        times = {"p50": 83_000, "p95": 599_000, "count": 50}
        consumer |= {"pinned": True, "healthy": False, "learned": {"run_ms": times}}
        consumer |= {"last_error": "the connection was closed before the answer was complete"}
        consumer |= {"total_requests": 1_234_567, "health_since": "2026-01-01T12:00:00Z"}
        consumer |= {"resident_source": "declared"}
    status["gpu"]["err"] = "NVML: Driver/library version mismatch; the declared figures decide"
    route.fulfill(json=status)


@pytest.mark.parametrize("state", ["as it is", "at its worst"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_in_reach(
    opened: Callable[..., Page], busy: Scene, width: int, state: str
) -> None:
    page = opened("about:blank", viewport={"width": width, "height": 900})
    if state == "at its worst":
        page.page.route("**/v1/status", worst)
    page.page.goto(busy.broker.url)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUT_OF_REACH) == []
    queue = page.page.locator("#queue").bounding_box()
    assert queue["height"] < 620, "thirty waiting jobs do not push the rest away"
    assert page.page.get_by_role("button", name="Cancel ticket").count() == WAITING + 1
    for what in ("Load", "Unload", "Pin" if state == "as it is" else "Unpin"):
        assert page.page.get_by_role("button", name=f"{what} {LONG_NAME}", exact=True).count() == 1
    assert not page.complaints


def test_what_is_out_of_reach_would_be_found(opened: Callable[..., Page], busy: Scene) -> None:
    page = shown(opened, busy, viewport={"width": 390, "height": 900})
    page.evaluate("document.querySelector('#services button').style.marginLeft = '380px'")
    page.evaluate("document.querySelector('#legend strong').style.marginRight = '-90px'")
    found = page.evaluate(OUT_OF_REACH)
    assert any("cannot be pressed" in each for each in found)
    assert any("off the page" in each for each in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_twelve_colours_stay_apart_for_everybody(
    opened: Callable[..., Page], busy: Scene, scheme: str
) -> None:
    page = shown(opened, busy, color_scheme=scheme)
    badges = page.evaluate(
        """() => [...document.querySelectorAll("#services .badge")].map((badge) => [
          badge.textContent, getComputedStyle(badge).backgroundColor])"""
    )
    assert len({number for number, _ in badges}) == len({colour for _, colour in badges}) == 12
    read = """(names) => names.map((name) => getComputedStyle(document.documentElement)
      .getPropertyValue(name))"""
    names = [f"--c{i}" for i in range(12)]
    palette = [colours.parse(each) for each in page.evaluate(read, names)]
    inks = [colours.parse(each) for each in page.evaluate(read, [f"--i{i}" for i in range(12)])]
    (panel,) = (colours.parse(each) for each in page.evaluate(read, ["--panel"]))
    for blindness in colours.BLINDNESS:
        seen = [colours.seen_with(blindness, colour) for colour in palette]
        closest = min(colours.distance(one, other) for one, other in combinations(seen, 2))
        assert closest > (0.12 if blindness == "none" else 0.065), blindness
    assert min(colours.contrast(colour, panel) for colour in palette) >= 3
    assert min(map(colours.contrast, palette, inks)) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_no_violations(
    opened: Callable[..., Page], busy: Scene, width: int, scheme: str
) -> None:
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = shown(opened, busy, **options)
    assert violations(page) == []
