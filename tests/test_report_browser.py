"""The page of a real report in a real browser: nothing fails, nothing is fetched, nothing lies over anything else."""

import json

import pytest

from .chromium import Chromium, find
from .conftest import invoke
from .page_reader import Page, check_numbers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find() is None, reason="no Chromium here (BALMS_TEST_CHROMIUM names one)")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the demo's three runs on handwritten digits."""
    root = tmp_path_factory.mktemp("report")
    made = invoke("demo", "--workspace", root / "demo", "--quiet")
    assert made.code == 0, made.err
    runs = [root / "demo" / "runs" / name for name in ("softmax", "balanced", "balms")]
    told = invoke("evaluate", *runs, "--report", root / "out", "--quiet")
    assert told.code == 0, told.err
    return root / "out"


@pytest.fixture(scope="module")
def browser(report, tmp_path_factory):
    browser = Chromium(find(), tmp_path_factory.mktemp("profile"))
    browser.open(report / "index.html")
    yield browser
    browser.close()


def test_no_error_and_no_request(browser, report):
    browser.run("new Promise(done => setTimeout(done, 500))")
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert not [e for e in browser.events if e.get("method") in complaints]
    asked = {e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {(report / "index.html").as_uri()}


def test_the_policy_holds(browser):
    """What the page does not bring itself is refused: the hashes are not just written down."""
    before = len(browser.events)
    browser.run("""(() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';
                   document.body.append(s); s.remove(); })()""")
    assert browser.run("window.bad === undefined")
    refused = [e for e in browser.events[before:] if "Content Security Policy" in json.dumps(e)]
    assert len(refused) >= 1
    del browser.events[before:]


def test_every_figure_and_picture_is_seen(browser, report):
    sizes = browser.run("[...document.querySelectorAll('svg.figure')].map(s => [s.getBoundingClientRect().width, "
                        "s.getBoundingClientRect().height, s.getBBox().width, s.getBBox().height])")  # fmt: skip
    assert len(sizes) == len(list(report.glob("*.png"))) == 16
    assert all(min(size) > 60 for size in sizes)
    pictures = browser.run("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(pictures) > 30 and all(done and width == 8 and alt for done, width, alt in pictures)


def test_every_number_is_the_json_s(browser, report):
    document = json.loads((report / "report.json").read_text())
    seen = check_numbers(Page("<!DOCTYPE html>" + browser.run("document.documentElement.outerHTML")), document)
    assert len(seen) > 400 and {f"runs.{i}.metrics.few.value" for i in range(3)} <= seen


@pytest.mark.parametrize("width", [360, 620, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, width):
    browser.size(width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    out = browser.run("""[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll table')
        && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)""")
    assert out == []


@pytest.mark.parametrize("width", [360, 1280])
def test_texts_of_figures_lie_within_them_and_not_over_each_other(browser, width):
    browser.size(width)
    wrong = browser.run("""(() => {
        const wrong = [];
        for (const svg of document.querySelectorAll('svg.figure')) {
            const box = svg.getBoundingClientRect(), name = svg.closest('figure').id;
            const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
            for (const [t, r] of texts)
                if (r.left < box.left - 3 || r.right > box.right + 3 || r.top < box.top - 3 || r.bottom > box.bottom + 3)
                    wrong.push(name + ': outside: ' + t.textContent);
            for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
                const [a, p] = texts[i], [b, q] = texts[j];
                const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (x > 1 && y > Math.min(p.height, q.height) * 0.35)
                    wrong.push(`${name}: ${a.textContent} over ${b.textContent}`);
            }
        }
        return wrong;
    })()""")
    assert wrong == []


def test_texts_of_figures_are_large_enough_for_a_phone(browser):
    """9 px and more at 360 px, which a figure within the text's column would not reach."""
    browser.size(360)
    smallest = browser.run("""Math.min(...[...document.querySelectorAll('svg.figure text')].map(t =>
        parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))""")
    assert smallest > 9.4


def test_dark_and_light(browser):
    look = ("(() => { const style = e => getComputedStyle(document.querySelector(e)); return [style('body').backgroundColor, "
            "style('svg.figure text').fill, style('.verdict').color]; })()")  # fmt: skip
    browser.size(1280)
    light = browser.run(look)
    browser.size(1280, dark=True)
    dark = browser.run(look)
    browser.size(1280)

    def brightness(colour: str) -> float:
        return sum(float(x) for x in colour[4:-1].split(",")) / 3

    assert brightness(light[0]) > 200 > 60 > brightness(dark[0])
    assert all(brightness(a) < 100 and brightness(b) > 180 for a, b in zip(light[1:], dark[1:], strict=True))


def test_a_point_says_its_name(browser):
    browser.size(1280)
    x, y = browser.run("""(() => {
        const svg = document.querySelector('#figure-accuracy-by-class-1 svg');
        svg.scrollIntoView({block: 'center', behavior: 'instant'});
        const point = svg.querySelector('use[data-name*="9\u2069:"]');
        const at = new DOMPoint(+point.getAttribute('x'), +point.getAttribute('y')).matrixTransform(svg.getScreenCTM());
        return [at.x, at.y]; })()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 3, y=y - 3)
    shown = browser.run("document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').textContent")
    assert shown.startswith("\u20689\u2069: ") and shown.endswith(" 3 training images")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run("document.querySelector('.tip').hidden")


def test_it_prints_with_all_that_is_folded_away(browser):
    folded = browser.run("document.querySelectorAll('details:not([open])').length")
    assert folded > 2
    assert browser.pdf()[:5] == b"%PDF-"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == folded
