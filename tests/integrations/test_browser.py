"""The report in a real browser: the system's Chromium, driven by Playwright, with axe-core for accessibility."""

import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import studies
from playwright.sync_api import Browser, Page, sync_playwright

from lrkit.study.charts import DARK, LIGHT
from lrkit.study.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BAD = '<script>alert("1")</script>&amp;'
WIDTHS = (360, 1280)
PAPERS = ("light", "dark")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of reports: of a whole study, of one with all that can go wrong, of bad names, and of nothing yet."""
    root = tmp_path_factory.mktemp("reports")
    small = {"seeds": (0, 1), "steps": 24, "layers": 2, "evaluate": 8}
    places = [(row, task, 2) for row in range(3) for task in ("movies", "rte")]
    wrong = {"running": [(1, "rte", 0)], "failed": [(2, "rte", 1)], "missing": [(3, "rte", 1)], "diverged": places}
    folders = {
        "whole": studies.write_study(root / "whole", steps=40, layers=3),
        "wrong": studies.write_study(
            root / "wrong",
            labels=["adalora", "metric=magnitude", "aflora", "lora"],
            tasks=["movies", "rte"],
            score=lambda row, task, seed: (0.83, 0.5, 0.82, 0.84)[row] + 0.004 * ((7 * seed + 3 * row) % 5 - 2),
            steps=40,
            layers=3,
            **wrong,
        ),
        "bad": studies.write_study(
            root / "bad",
            labels=[BAD, f"metric={BAD * 3}", f"aflora{BAD}"],
            title=BAD,
            note=BAD,
            error=BAD * 20,
            failed=[(1, "movies", 0)],
            **small,
        ),
        "rows": studies.write_study(root / "rows", labels=["base", *(f"metric=m{i}" for i in range(11))], **small),
        "empty": studies.write_study(
            root / "empty", labels=["base"], missing=[(0, "movies", s) for s in (0, 1)], costs=False, **small
        ),
    }
    for folder in folders.values():
        write_report(folder)
    return {name: (folder / "report.html").as_uri() for name, folder in folders.items()}


@pytest.fixture
def opened(browser: Browser, reports: dict[str, str]) -> Iterator[object]:
    """Open a report by its name; whatever the console says and the network is asked for is kept on the page."""
    pages: list[Page] = []

    def opened(name: str, width: int = 1280, paper: str = "light", **settings: object) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=paper, **settings)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(reports[name])
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()


NAMES = ("whole", "wrong", "bad", "rows", "empty")


@pytest.mark.parametrize("name", NAMES)
def test_says_and_asks_nothing(opened, reports: dict[str, str], name: str) -> None:
    """The console stays empty, nothing is requested but the page itself, and no dialog of a bad name opens."""
    page = opened(name)
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    for button in page.query_selector_all("th button, summary"):
        button.click()
    assert page.said == []
    assert page.asked == [reports[name]]


CUT = """() => {
  const out = [], width = document.documentElement.clientWidth, name = (e) => `${e.tagName} ${e.textContent.slice(0, 40)}`;
  if (document.documentElement.scrollWidth > width) out.push(`page ${document.documentElement.scrollWidth}`);
  for (const e of document.querySelectorAll("main *:not(svg *)")) {
    const box = e.getBoundingClientRect();
    if (!box.width || e.closest(".unseen") || e.closest(".scroll, pre") && !e.matches(".scroll, pre")) continue;
    if (box.left < -0.5 || box.right > width + 0.5) out.push(`beyond the page: ${name(e)}`);
    const wide = e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline";
    if (wide && !e.matches("[tabindex='0']")) out.push(`cut off: ${name(e)} ${e.scrollWidth} ${e.clientWidth}`);
  }
  for (const cell of document.querySelectorAll("th, td"))
    if (cell.scrollWidth > cell.clientWidth + 1) out.push(`over the next column: ${name(cell)}`);
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), picture = text.closest("svg").getBoundingClientRect();
    if (!picture.width) continue;
    const across = box.left < picture.left - 1 || box.right > picture.right + 1;
    if (across || box.top < picture.top - 2 || box.bottom > picture.bottom + 2)
      out.push(`cut off in a chart: ${text.textContent}`);
  }
  return out;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off(opened, name: str, width: int) -> None:
    """No text or chart ends outside of the page or its own box; what scrolls can be reached by keyboard."""
    page = opened(name, width)
    page.evaluate("() => document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert page.evaluate(CUT) == []


OVERLAPS = """() => {
  const out = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, x] = boxes[i], [b, y] = boxes[j];
      const across = x.left + 1 < y.right && y.left + 1 < x.right;
      if (across && x.top + 4 < y.bottom && y.top + 4 < x.bottom) out.push(`${a} over ${b}`);
    }
  }
  return out;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["whole", "wrong", "rows"])
def test_no_text_covers_another(opened, name: str, width: int) -> None:
    """Ticks, names, labels and values of a chart stand beside each other."""
    assert opened(name, width).evaluate(OVERLAPS) == []


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing(opened, name: str, width: int, paper: str) -> None:
    """axe-core knows no violation, on light paper and on dark, with everything unfolded."""
    page = opened(name, width, paper)
    page.evaluate("() => document.querySelectorAll('details').forEach((each) => each.open = true)")
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    assert [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in found] == []


@pytest.mark.parametrize(("paper", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_paper_is_the_reader_s(opened, paper: str, colours: dict[str, str]) -> None:
    """Page and charts have the colours of the paper that the reader's system asks for."""
    page = opened("whole", paper=paper)

    def rgb(colour: str) -> str:
        return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"

    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(colours["paper"])
    tick = "getComputedStyle(document.querySelector('#curves svg text')).fill"
    assert page.evaluate(tick) == rgb(colours["soft"])


def test_sorted_by_keyboard(opened) -> None:
    """Tab comes to a heading, Enter sorts by it, Enter again the other way, and a screen reader is told."""
    page = opened("wrong")
    scores = "() => [...document.querySelector('table.main').tBodies[0].rows].map((row) => row.cells[2].dataset.v)"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "accuracy, %":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    falling = [float(score) for score in page.evaluate(scores)]
    assert falling == sorted(falling, reverse=True)
    head = "document.activeElement.closest('th').getAttribute('aria-sort')"
    assert page.evaluate(head) == "descending"
    page.keyboard.press("Space")
    assert [float(score) for score in page.evaluate(scores)] == falling[::-1]
    assert page.evaluate(head) == "ascending"


def test_folded_and_scrolled_by_keyboard(opened) -> None:
    """On a telephone a table wider than the page scrolls by the arrows, and a traceback opens by Enter."""
    page = opened("wrong", 360)
    opening = moving = False
    for _ in range(120):
        page.keyboard.press("Tab")
        active = page.evaluate("[document.activeElement.tagName, document.activeElement.closest('section')?.id]")
        if active == ["DIV", "results"] and not moving:
            page.keyboard.press("ArrowRight")
            for _ in range(100):  # scrolling is smooth, and the page's policy forbids Playwright's own waiting
                page.wait_for_timeout(50)
                if moving := page.evaluate("document.activeElement.scrollLeft > 0"):
                    break
        if active == ["SUMMARY", "failures"]:
            page.keyboard.press("Enter")
            opening = page.evaluate("document.activeElement.parentNode.open")
            break
    assert (opening, moving) == (True, True)


def test_printed_whole(opened, tmp_path: Path) -> None:
    """On paper the page keeps its charts: a PDF is made, and tables do not hide a part behind a scroll bar."""
    page = opened("whole")
    page.emulate_media(media="print")
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every((e) => getComputedStyle(e).overflowX === 'visible')"
    )
