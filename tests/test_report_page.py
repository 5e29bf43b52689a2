"""The report's page: what is in it, that every number is the JSON's, and that no name of a stranger leaves its place."""

import base64
import copy
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balms_cli.metrics import Scores
from balms_cli.report import figures, figures_accuracy, svg
from balms_cli.report.canvas import class_room, room
from balms_cli.report.document import build
from balms_cli.report.html import Numbers, escape, named, tag
from balms_cli.report.page import render, write_page
from balms_cli.report.palette import DARK, LIGHT
from balms_cli.report.parts import Parts
from balms_cli.report.thumbnails import thumbnails
from balms_cli.report.verdict import gap_is_real, verdict
from balms_cli.report.view import View

from .conftest import draw_photos
from .page_reader import Page, check_numbers, look_up
from .report_helpers import long_tail, make_header, make_manifest, make_scored, noisy_logits

COUNTS = [300, 150, 60, 30, 12, 6, 3]
K = len(COUNTS)
SECTIONS = ["data", "groups", "classes", "confusion", "calibration", "marginal", "rates", "curves", "recipe", "provenance"]
PER_RUN = ["accuracy-by-class", "confusion", "reliability"]
HOSTILE = ["<script>alert(1)</script>", "$\\frac{x}$", '" onmouseover="alert(1)', "\u202eesrever\u200f", "a" * 300,
           "_hidden & ]]>", "<b>\ufffe漢字 🦔</b>"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_png():
    """Figures as PNG cost half of a page's time; where they are looked at, a test asks for them by ``slow_png``."""
    patch = pytest.MonkeyPatch()
    patch.setattr("balms_cli.report.parts.png", lambda figure, title: b"png of " + title.encode())
    yield
    patch.undo()


@pytest.fixture
def slow_png(monkeypatch):
    monkeypatch.setattr("balms_cli.report.parts.png", svg.png)


@pytest.fixture(scope="module")
def labels():
    return np.repeat(np.arange(K), 12)


def scored_runs(labels, names=None, runs=("/runs/weak", "/runs/strong"), counts=COUNTS):
    """A run whose scores favour the frequent classes, and a stronger one whose scores do not."""
    k = len(counts)
    manifest = make_manifest(counts, labels, names=names)
    rng = np.random.default_rng(1)
    weak = noisy_logits(rng, labels, k, 2.0) + np.log(counts)
    weak[:, -1] = -50
    headers = [make_header(manifest, stage="pretrain", loss="softmax"), make_header(manifest)]
    logits = [weak, noisy_logits(rng, labels, k, 4.0)]
    return [make_scored(manifest, z, run=run, header=h) for z, run, h in zip(logits, runs, headers, strict=False)]


@pytest.fixture(scope="module")
def several(labels):
    """The document of two runs, with what only a run's folder would add."""
    document = build(scored_runs(labels))
    step = list(range(10, 210, 10))
    curve = {"step": step, "loss": [2 / s + 0.1 for s in step], "lr": [0.1 - s / 3000 for s in step]}
    for run, stage in zip(document["runs"], ("pretrain", "retrain"), strict=True):
        run["curves"] = {"stage": stage, **curve}
    document["runs"][1]["parent_curves"] = document["runs"][0]["curves"]
    document["runs"][1]["rates"] = {"kind": "sample rates", "values": [0.3, 0.4, 0.5, 0.5, 0.6, 0.7, 0.8], "variance": 0.0261}
    document["runs"][1]["recipe"]["odd.key"] = {"value": [0.9, 0.99], "source": "flag"}
    document["seeds"] = [{"label": "retrain, balanced", "runs": ["weak", "strong"], "varied": "classifier seeds", "metrics": {
        m: {"mean": 0.5, "error": 0.0123, "n": 2} for m in document["runs"][0]["metrics"]}}]  # fmt: skip
    return document


@pytest.fixture(scope="module")
def single(labels):
    return build(scored_runs(labels)[:1])


@pytest.fixture(scope="module")
def page_of_several(several):
    html, files = render(several, {})
    return Page(html), files


@pytest.fixture(scope="module")
def page_of_single(single):
    html, files = render(single, {})
    return Page(html), files


def test_sections_stand_in_order_and_links_lead_somewhere(page_of_several):
    page, files = page_of_several
    assert [e.attributes["id"] for e in page.all("section")] == SECTIONS
    assert page.one("h1").text == "photos" and page.one("html").attributes["lang"] == "en"
    assert [e.text for e in page.all("title") if "svg" not in e.inside] == ["photos – balms report"]
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    written = {"report.json", "report.md", "classes.csv", "runs.csv", *files}
    for link in page.all("a"):
        place = link.attributes["href"]
        assert place[1:] in ids if place.startswith("#") else place in written, place
    inner = {m for e in page.elements for v in e.attributes.values() for m in re.findall(r"url\(#([^)]+)\)", v or "")}
    inner |= {e.attributes["href"][1:] for e in page.all("use")}
    assert inner and inner <= set(ids)


def test_every_figure_is_there_twice_and_says_what_it_shows(page_of_several, page_of_single):
    once = ["class-counts", "accuracy-by-group", "marginal"]
    for (page, files), names in (
        (page_of_single, [*once, *PER_RUN]),
        (page_of_several, [*once, "differences", "rates", "curves-pretrain", "curves-retrain",
                           *(f"{name}-{i}" for name in PER_RUN for i in (1, 2))]),
    ):  # fmt: skip
        assert {f"figure-{name}" for name in names} == {e.attributes["id"] for e in page.all("figure") if "id" in e.attributes}
        assert set(files) == {f"{name}.png" for name in names}
        drawn = page.all("svg", class_="figure")
        assert len(drawn) == len(names)
        assert all(e.attributes["role"] == "img" and len(e.attributes["aria-label"]) > 20 for e in drawn)


def test_nothing_is_fetched_and_nothing_runs_but_the_page_s_own_script(page_of_several):
    page, _ = page_of_several

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "img-src": "data:", "style-src": digest(page.one("style").text),
                     "script-src": digest(page.one("script").text), "base-uri": "'none'", "form-action": "'none'"}  # fmt: skip
    for element in page.elements:
        assert not {"style", "onload", "onclick", "srcset"} & set(element.attributes)
        for key in ("src", "href", "xlink:href"):
            assert not re.match(r"\w+://|//", element.attributes.get(key) or ""), element
    assert "url(" not in page.one("style").text and "@import" not in page.one("style").text


def test_tables_are_tables(page_of_several):
    page, _ = page_of_several
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) > 5
    assert all(th.attributes.get("scope") in ("col", "row") for th in page.all("th"))
    scrolls = [e for e in page.all("div") if "scroll" in (e.attributes.get("class") or "").split()]
    assert len(scrolls) == len(tables) and all(e.attributes["tabindex"] == "0" and e.attributes["aria-label"] for e in scrolls)


@pytest.mark.parametrize("which", ["single", "several"])
def test_every_number_is_the_json_s(which, request):
    document = request.getfixturevalue(which)
    page, _ = request.getfixturevalue(f"page_of_{which}")
    seen = check_numbers(page, document)
    wanted = ["data.imbalance_factor", "data.gini", "data.head_share", "data.train_counts.6", "images", "intervals.draws"]
    for i, run in enumerate(document["runs"]):
        wanted += [f"runs.{i}.metrics.{m}.{end}" for m in run["metrics"] for end in ("value", "low", "high")]
        wanted += [f"runs.{i}.calibration.{g}.ece" for g in ("all", "many", "medium", "few")]
        wanted += [f"runs.{i}.confusion.groups.{g}.{c}" for g in ("many", "few") for c in ("right", "many", "few")]
        wanted += [f"runs.{i}.marginal.{key}" for key in ("variance", "kl_from_uniform", "few")]
        wanted += [f"runs.{i}.per_class.accuracy.{c}" for c in range(K)]
        wanted += [f"runs.{i}.trend.slope", f"runs.{i}.recipe.lr.value"]
        wanted += [f"runs.{i}.confusion.pairs.0.{key}" for key in ("count", "share", "examples.0.score")]
    if which == "several":
        wanted += [f"differences.0.metrics.{m}.{end}" for m in ("few", "top1") for end in ("value", "low", "high")]
        wanted += ["seeds.0.metrics.few.mean", "seeds.0.metrics.few.error", "runs.1.rates.variance",
                   "runs.1.recipe.odd~1key.value.1", "runs.#"]  # fmt: skip
    assert not set(wanted) - seen


def test_no_decimal_stands_outside_of_a_number_element(page_of_several):
    """What is computed is marked; whole numbers are also words: 'top 5', '95 %' of the axis, '1/C'."""
    page, _ = page_of_several
    apart = {"data", "svg", "code", "bdi", "style", "script", "time"}
    text = "".join(_own_text(page, apart))
    text = text.replace("balms 0", "")  # the version at the end
    assert not re.findall(r"\d+[.,]\d+", text)


def _own_text(page: Page, apart: set[str]):
    """The text of the page without that of the tags ``apart``."""

    class Reader(type(page)):
        def __post_init__(self):
            self.kept = []
            super().__post_init__()

        def handle_data(self, data):
            super().handle_data(data)
            if not apart & {e.tag for e in self._open}:
                self.kept.append(data)

    return Reader(page.source).kept


def test_a_wrong_number_is_seen(page_of_single, single):
    page, _ = page_of_single
    changed = copy.deepcopy(single)
    changed["runs"][0]["metrics"]["few"]["value"] += 0.01
    with pytest.raises(AssertionError):
        check_numbers(page, changed)


def test_names_of_strangers_stay_in_their_place(labels, single, page_of_single):
    """A page of hostile names has, element by element, the shape of one of harmless names."""
    wild = build(scored_runs(labels, HOSTILE, ['/runs/<img src=x onerror="a()">$y$'])[:1])
    page = Page(render(wild, {})[0])

    def shape(of: Page) -> list:
        return [(e.tag, e.attributes.get("class") if "svg" not in e.inside else None, sorted(set(e.attributes) - {"title"}))
                for e in of.elements if e.tag not in ("path", "g")]  # fmt: skip

    assert shape(page) == shape(page_of_single[0])
    check_numbers(page, wild)
    shown = {e.text for e in page.all("bdi")}
    assert {"<script>alert(1)</script>", "$\\frac{x}$", '" onmouseover="alert(1)', "_hidden & ]]>"} <= shown
    assert max(len(text) for text in shown) <= 300 and any(e.attributes.get("title") == "a" * 300 for e in page.all("bdi"))
    turns = set("\u202e\u200f")
    assert all(not turns & set(v or "") for e in page.elements for v in e.attributes.values())
    assert all("bdi" in e.inside or e.tag == "bdi" or "svg" in e.inside or not turns & set(e.text)
               for e in page.elements if e.tag in ("span", "code", "a", "dd"))  # fmt: skip


def test_a_dollar_is_a_dollar_in_figures(labels, slow_png):
    """Matplotlib would set text between dollars as mathematics, fail on what is none, and leave out names as ``_x``."""
    document = build(scored_runs(labels, [f"$a_{c}^$" for c in range(K)], ["/runs/$\\bad{$", "/runs/_$x$"]))
    parts = Parts(document, {})
    texts = [e.text for e in Page(str(parts.figure(figures.marginal))).all("text")]
    assert {"$a_0^$", "$\\bad{$", "\u200b_$x$"} <= set(texts)
    assert Image.open(io.BytesIO(parts.files["marginal.png"])).size[0] > 500


def test_fonts_that_are_there_help_out_in_a_png(monkeypatch):
    import matplotlib

    monkeypatch.setattr(svg, "_FONTS", ("STIXGeneral", "No Such Font"))  # the first comes with matplotlib
    with svg.drawing("a figure"):
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]


def test_wide_letters_have_their_room(labels):
    """Chinese, Japanese and Korean letters are as wide as two others."""
    narrow, wide = (View(build(scored_runs(labels, [letter * n + str(c) for c in range(K)])[:1]))
                    for letter, n in (("abcdefgh", 1), ("漢字名前", 1)))  # fmt: skip
    assert class_room(wide) == class_room(narrow) > 0.7
    assert room(["漢" * 15] * 2) > room(["a" * 15] * 2)


def test_the_same_document_makes_the_same_bytes_and_matplotlib_stays_as_it_was(single, slow_png):
    import matplotlib
    from matplotlib import _pylab_helpers

    shown = dict(_pylab_helpers.Gcf.figs)
    html, files = render(single, {})
    before = dict(matplotlib.rcParams)
    try:
        matplotlib.rcParams.update({"figure.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "text.usetex": True})
        changed = dict(matplotlib.rcParams)
        again, files_again = render(single, {})
        assert dict(matplotlib.rcParams) == changed
    finally:
        matplotlib.rcParams.update(before)
    assert again == html and files_again == files
    assert _pylab_helpers.Gcf.figs == shown  # nothing more that a notebook would show


def test_one_class_only(tmp_path):
    labels = np.zeros(5, int)
    one = make_scored(make_manifest([30], labels, names=["cat"]), np.zeros((5, 1)))
    document = build([one])
    write_page(document, [one], tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    check_numbers(page, document)
    assert "only one class" in page.one("p", class_="headline").text
    assert "No image is taken for another class" in page.one("section", id="confusion").text
    assert page.one("p", class_="about").text.startswith("run scored on 5 test images of 1 class, ")
    assert "30 training images of 1 class." in page.one("section", id="data").text
    assert "scores right on average" in page.one("header").text


def test_classes_that_are_never_predicted_or_never_tested():
    """And a test set that is not even, a class prior of its own, and counts that differ between the runs."""
    labels = np.array([0] * 20 + [1] * 9 + [2] * 2)
    manifest = make_manifest([120, 50, 9, 1], labels, names=["a", "b", "c", "d"])
    logits = np.tile([3.0, 0, 0, 0], (len(labels), 1))
    prior = {"target_prior": "uniform", "posthoc_tau": 1.0}
    first = make_scored(manifest, logits, **prior)
    other = make_scored(manifest, logits, run="/nowhere/other", header=make_header(manifest, counts=[5, 5, 200, 5]), **prior)
    document = build([first, other])
    page = Page(render(document, {})[0])
    check_numbers(page, document)
    text = page.one("main").text
    assert "The test images are not even" in text and "Trained on other counts" in text
    assert "re-scored for another class prior" in page.one("header").text
    assert document["runs"][0]["never_predicted"] == 3
    assert [e.text for e in page.all("h3") if e.text.startswith("never")] == ["never predicted"]
    assert "1 class without a test image" in text and "The largest class holds" in text


def test_runs_on_other_images_are_not_said_to_be_scored_on_the_first_s(labels):
    first, other = scored_runs(labels)
    document = build([first, other])
    assert Page(render(document, {})[0]).one("p", class_="about").text.startswith("2 runs scored on 84 test images of 7 ")
    document["runs"][1]["same_images"] = False
    assert Page(render(document, {})[0]).one("p", class_="about").text.startswith("2 runs, the first scored on 84 test ")


def test_right_to_left_names_leave_the_words_beside_them_in_order(labels):
    """In a title and at a point a name stands isolated, and is read as it is; matplotlib gets no marks of direction."""
    names = ["חתול", "\u202eesrever\u202c", *(f"class {c}" for c in range(2, K))]
    parts = Parts(build(scored_runs(labels, names, ["/runs/נסיון\u2069", "/runs/b"])), {})
    page = Page(str(parts.figure(figures_accuracy.by_class, 0)))
    assert page.one("h3").text == "\u2068נסיון\u2069: accuracy of each class"
    assert page.one("a").attributes["aria-label"] == "נסיון: accuracy of each class as PNG"
    assert parts.files["accuracy-by-class-1.png"] == "png of נסיון: accuracy of each class".encode()
    titles = {e.text.partition(":")[0] for e in page.all("title")}
    assert {"\u2068חתול\u2069", "\u2068esrever\u2069"} <= titles
    assert "\u202e" not in str(parts.figure(figures.class_counts))


def test_regions_are_named_in_words(page_of_several):
    regions = [e.attributes["aria-label"] for e in page_of_several[0].all("div", role="region")]
    assert "Shot groups, by a class’s training images" in regions and not [r for r in regions if re.search(r"[a-z%],?under", r)]


def test_a_trend_that_falls_is_said_to_fall(single):
    down = copy.deepcopy(single)
    down["runs"][0]["trend"]["slope"] = -0.123
    said = figures_accuracy.by_class(View(down), 0).label
    assert said.endswith("The trend goes down by 12.3 points for ten times as many images.")


def test_more_runs_than_colours(labels, monkeypatch):
    """Figures show the first and the best of the others; the table has all."""
    monkeypatch.setattr("balms_cli.report.view.RUNS", 2)
    weak, strong = scored_runs(labels)
    document = build([weak, weak, strong, weak])
    page, files = render(document, {})
    page = Page(page)
    check_numbers(page, document)
    assert {name for name in files if name.startswith("confusion")} == {"confusion-1.png", "confusion-3.png"}
    (rows,) = [e for e in page.all("div") if (e.attributes.get("aria-label") or "").startswith("Accuracy of each run")]
    assert all(name in rows.text for name in ("weak", "weak (2)", "strong", "weak (3)"))
    assert "the table has all 4" in page.one("section", id="groups").text


def test_names_of_points_are_in_the_page_up_to_a_limit(page_of_single, several, monkeypatch):
    page, _ = page_of_single
    titles = [e.text for e in page.all("title") if "use" in e.inside]
    assert sorted(titles)[0] == "\u2068class 0\u2069: 100.0 %, 300 training images" and len(titles) == K
    monkeypatch.setattr("balms_cli.report.figures_accuracy.POINTS", 2)
    crowded = Page(render(several, {})[0])
    assert not [e for e in crowded.all("title") if "use" in e.inside]
    pictures = [e for e in crowded.all("image") if "svg" in e.inside]
    assert pictures and all(e.attributes["href"].startswith("data:image/png;base64,") for e in pictures)


def test_colours_of_figures_are_the_page_s_own(page_of_several):
    css = page_of_several[0].one("style").text
    rules = [rule for rule in re.findall(r"\.f\d+\{[^}]*\}", css)]
    assert len(rules) > 20 and "var(--many)" in "".join(rules)
    assert not [rule for rule in rules if re.search("#[0-9a-fA-F]{3,6}", rule)]


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast ratio of two colours."""

    def light(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_and_told_apart(colours):
    for text in ("ink", "muted", "accent"):
        assert all(contrast(colours[text], colours[ground]) >= 4.5 for ground in ("paper", "ground", "soft"))
    marks = ["many", "medium", "few", *(f"run{i}" for i in range(6))]
    assert all(contrast(colours[mark], colours["paper"]) >= 3 for mark in marks)
    # As seen without the long-wave or the middle-wave cone (Vienot, Brettel and Mollon, 1999), on linear light.
    without = {"protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
               "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]}  # fmt: skip
    for matrix in without.values():
        seen = [np.array(matrix) @ (np.array([int(colours[g][i : i + 2], 16) for i in (1, 3, 5)]) / 255) ** 2.2
                for g in ("many", "medium", "few")]  # fmt: skip
        seen = [c.clip(0, 1) ** (1 / 2.2) for c in seen]
        assert min(np.abs(a - b).max() for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2]))) > 0.12


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory):
    """A run on real files, some of which have gone bad since."""
    root = draw_photos(tmp_path_factory.mktemp("photos"), {"cat": 4, "dog": 4}, size=50)
    keys = [f"{name}/{i:03}.png" for name in ("cat", "dog") for i in range(4)]
    secret = root.parent / "secret.png"
    Image.new("RGB", (50, 50), (1, 2, 3)).save(secret)
    (root / keys[0]).unlink()
    (root / keys[0]).symlink_to(secret)
    (root / keys[1]).write_bytes(b"not an image")
    (root / keys[2]).unlink()
    labels = np.repeat([0, 1], 4)
    manifest = make_manifest([40, 6], labels, names=["cat", "dog"], root=str(root), keys=keys)
    return make_scored(manifest, np.stack([labels, 1 - labels], axis=1) * np.linspace(1, 2, 8)[:, None]), keys


def test_example_images_are_shown_and_bad_ones_are_not(photo_run, tmp_path):
    one, keys = photo_run
    found = thumbnails([one], [(0, key) for key in keys])
    assert set(found) == {(0, key) for key in keys[3:]}
    for uri in found.values():
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert image.size == (32, 32)  # the manifest's own size, which is smaller than a thumbnail may be
    blue_or_red = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
    truth = np.asarray(Image.open(Path(one.manifest.source["root"]) / keys[-1])).reshape(-1, 3).mean(0)
    assert np.abs(blue_or_red - truth).max() < 6
    document = build([one])
    page = Page(write_page(document, [one], tmp_path).read_text())
    shown = [e for e in page.all("img")]
    asked = [e for pair in document["runs"][0]["confusion"]["pairs"] for e in pair["examples"]]
    assert {e.attributes["title"] for e in shown} == {e["key"] for e in asked} & set(keys[3:])
    assert all(e.attributes["alt"] and e.attributes["src"].startswith("data:image/") for e in shown)
    assert len(page.all("div", class_="gone")) == len(asked) - len(shown) > 0
    assert (tmp_path / "class-counts.png").is_file()


def test_digits_and_a_folder_that_is_gone(photo_run):
    from dataclasses import replace

    one, keys = photo_run
    gone = replace(one, manifest=replace(one.manifest, source=one.manifest.source | {"root": "/nowhere"}))
    assert thumbnails([gone], [(0, keys[3])]) == {}
    source = {"kind": "digits", "name": "digits", "root": ""}
    digits = replace(one, manifest=replace(one.manifest, source=source, image_size=[8, 8]))
    uri = thumbnails([digits], [(0, "digit-0001")])[0, "digit-0001"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    from sklearn.datasets import load_digits

    assert np.array_equal(image[..., 0], np.rint(load_digits().images[0] * (255 / 16)))
    assert thumbnails([digits], [(0, "digit-9999")]) == {}


def verdict_of(document) -> tuple[str, str, str]:
    found = verdict(View(document), Numbers(document))

    def plain(parts) -> str:
        return " ".join(re.sub("<[^>]*>", "", part) for part in parts)

    return plain([found.headline]), plain(found.points), plain([f"{text} {command}" for text, command in found.advice])


def test_the_verdict_on_a_run_that_forgets_the_tail(single):
    headline, points, advice = verdict_of(single)
    many, few = (single["runs"][0]["metrics"][g]["value"] for g in ("many", "few"))
    assert headline.startswith(f"The long tail costs {100 * (many - few):.1f} points")
    assert "favour the frequent classes" in points and "1 of 7 classes is never predicted (class 6)" in points
    assert "balms retrain /runs/weak --loss balanced --meta-sampler" in advice
    assert "balms evaluate /runs/weak --target-prior uniform" in advice


def changed_run(document, *, marginal: dict | None = None, metrics: dict | None = None, spread: float = 0.02, **more):
    """A copy whose run 0 has other group accuracies, and scores that give each group its part."""
    document = copy.deepcopy(document)
    run = document["runs"][0]
    for name, value in (metrics or {}).items():
        run["metrics"][name] = {"value": value, "low": value - spread, "high": value + spread}
    if marginal:
        run["marginal"] |= marginal | {"per_share": marginal}
    run |= more
    return document


LEVEL = {"many": 1.0, "medium": 1.0, "few": 1.0}
HEAD, TAIL = {"many": 1.5, "medium": 1.0, "few": 0.6}, {"many": 0.6, "medium": 1.0, "few": 1.4}


@pytest.mark.parametrize("change, says", [
    (dict(marginal=LEVEL, metrics={"many": 0.8, "few": 0.5}), ["more images help most", "class 6"]),
    (dict(marginal=LEVEL, metrics={"many": 0.8, "few": 0.79}), ["nothing to mend", "could be chance"]),
    (dict(marginal=LEVEL, metrics={"many": 0.8, "few": 0.77}), ["only 3.0 points"]),
    (dict(marginal=LEVEL, metrics={"many": 0.6, "few": 0.8}), ["20.0 points above many-shot ones, 80.0 % against 60.0 %.",
                                                               "no worse than the frequent"]),
    (dict(marginal=LEVEL, metrics={"many": 0.8, "few": 0.83}), ["only 3.0 points above many-shot ones, 83.0 % against 80.0 %"]),
    (dict(marginal=LEVEL, metrics={"many": 0.8, "few": 0.6}, spread=0.2),
     ["20.0 points below many-shot ones, 60.0 % against 80.0 %; the difference could be chance.", "more test images"]),
    (dict(marginal=LEVEL, metrics={"many": 0.6, "few": 0.8}, spread=0.2),
     ["20.0 points above many-shot ones, 80.0 % against 60.0 %; the difference could be chance."]),
    (dict(marginal=HEAD, metrics={"many": 0.8, "few": 0.6}, spread=0.2), ["could be chance", "does not favour the frequent"]),
    (dict(marginal=LEVEL | {"few": 1.24}), ["Its scores are balanced"]),
    (dict(marginal=LEVEL | {"few": 0.81}), ["Its scores are balanced"]),
    (dict(marginal=LEVEL | {"few": 1.26}), ["favour the rare"]),
    (dict(marginal=LEVEL | {"few": 0.79}), ["favour the frequent"]),
    (dict(marginal=TAIL, metrics={"many": 0.6, "few": 0.8}, loss="balanced", sampler="class"),
     ["favour the rare classes", "over-balances"]),
    (dict(marginal=TAIL, metrics={"many": 0.6, "few": 0.8}, loss="balanced"), ["--loss-exponent 0.75"]),
    (dict(marginal=TAIL, metrics={"many": 0.6, "few": 0.2}), ["because it is unsure", "better backbone"]),
    (dict(marginal=HEAD, metrics={"many": 0.8, "few": 0.5}, loss="balanced", stage="retrain"),
     ["train it longer", "--meta-sampler --steps"]),
])  # fmt: skip
def test_the_verdict_follows_from_the_numbers(single, change, says):
    told = " ".join(verdict_of(changed_run(single, **change)))
    assert all(words.lower() in told.lower() for words in says), told


def test_advice_on_a_classifier_starts_from_its_backbone_and_doubles_its_steps(single):
    of = changed_run(single, marginal=HEAD, loss="balanced", stage="retrain")
    of["runs"][0]["provenance"]["parent"], of["runs"][0]["recipe"]["steps"] = "/runs/first/model.safetensors", {"value": 150}
    assert "balms retrain /runs/first --loss balanced --meta-sampler --steps 300" in verdict_of(of)[2]


@pytest.mark.parametrize("key, values, told", [
    ("backbone", ("resnet18", "resnet32"), "different backbones (resnet18, resnet32), so gaps are not the last layer"),
    ("image_size", (32, 64), "images of different sizes"), ("weights", (None, "imagenet"), "different weights"),
    ("backbone", ("resnet32", "resnet32"), None),
])  # fmt: skip
def test_the_verdict_says_where_backbones_differ(several, key, values, told):
    of = copy.deepcopy(several)
    for run, value in zip(of["runs"], values, strict=True):
        run["recipe"][key] = {"value": value, "source": "stage 1"}
    points = " ".join(verdict_of(of))
    assert told in points if told else "The runs have" not in points
    del of["runs"][0]["recipe"][key]  # not known
    assert "not the last layer" not in " ".join(verdict_of(of))


def test_of_equal_runs_the_first_is_the_best(several):
    equal = copy.deepcopy(several)
    equal["runs"][1]["metrics"] = equal["runs"][0]["metrics"]
    assert View(equal).best == 0 and verdict_of(equal)[0].startswith("No run is better than weak")


def test_a_point_has_the_name_of_its_class(page_of_single, single):
    """Names are given to the points in the order in which they were drawn: by the axis, the further right the more images."""
    uses = [e for e in page_of_single[0].all("use") if "#" in e.attributes["href"] and e.text]
    right_to_left = sorted(uses, key=lambda use: -float(use.attributes["x"]))
    assert [use.text[1:8] for use in right_to_left] == [f"class {c}" for c in range(K)]
    heights = [-float(use.attributes["y"]) for use in right_to_left]
    accuracy = single["runs"][0]["per_class"]["accuracy"]
    assert np.corrcoef(heights, accuracy)[0, 1] == pytest.approx(1, abs=1e-4)


def test_lines_of_the_reliability_diagram_leave_out_small_bins(single):
    figure = figures_accuracy.reliability(View(single), 0).figure
    bins = single["runs"][0]["calibration"]["all"]["bins"]
    (line,) = [line for line in figure.axes[0].lines if line.get_linewidth() == 2 and len(line.get_xdata())]
    assert list(line.get_ydata()) == [100 * b["accuracy"] for b in bins if b["n"] >= 5]
    assert any(0 < b["n"] < 5 for b in bins)


def test_a_curve_is_shown_as_it_is_and_as_a_running_mean(several):
    loss = np.array(several["runs"][0]["curves"]["loss"])
    thin, thick = figures.curves(View(several), "pretrain").figure.axes[0].lines
    assert np.array_equal(thin.get_ydata(), loss) and thin.get_linewidth() < 1 < thick.get_linewidth()
    assert thick.get_ydata() == pytest.approx([loss[max(0, i - 1) : i + 2].mean() for i in range(20)])
    values = np.random.default_rng(0).random(200)
    assert figures._smooth(values) == pytest.approx([values[max(0, i - 5) : i + 6].mean() for i in range(200)])


def test_only_real_differences_are_filled(several):
    chance = copy.deepcopy(several)
    for metric, found in chance["differences"][0]["metrics"].items():
        found["real"] = metric == "few"
    lines = figures_accuracy.differences(View(chance)).figure.axes[0].lines
    marks = [line for line in lines if line.get_marker() == "s" and len(line.get_xdata())]
    empty = [mark.get_markerfacecolor() == LIGHT["paper"] for mark in marks]
    assert empty == [True, True, False, True]  # many, medium, few, all classes


def test_the_classes_that_do_worst_are_named_the_rarer_of_equals_first(single):
    of = changed_run(single, marginal=LEVEL, metrics={"many": 0.8, "few": 0.5})
    of["runs"][0]["per_class"]["accuracy"] = [0.1, 0.5, 0.5, 0.9, 0.5, None, 0.9]
    assert "do worst: class 0, class 4, class 2." in verdict_of(of)[2]


def test_the_rarest_of_the_classes_that_are_never_predicted_are_named(single):
    of = copy.deepcopy(single)
    of["runs"][0]["per_class"]["predicted"][1:5], of["runs"][0]["never_predicted"] = [0] * 4, 5
    assert "5 of 7 classes are never predicted (class 6, class 4, class 3, …)." in verdict_of(of)[1]


def test_the_verdict_on_several_runs(several):
    headline, _, advice = verdict_of(several)
    assert headline.startswith("strong recognises few-shot classes better than weak by")
    assert "Both differences are real" in headline
    assert "balms predict /runs/strong IMAGES" in advice
    chance = copy.deepcopy(several)
    chance["differences"][0]["metrics"]["balanced_accuracy"] |= {"low": -0.1, "real": False}
    headline, _, advice = verdict_of(chance)
    assert "could be chance" in headline and "predict" not in advice
    apart = copy.deepcopy(several)
    apart["differences"] = []
    assert "on other images" in verdict_of(apart)[0]
    chance["runs"].reverse()
    assert verdict_of(chance)[0].startswith("No run is better than strong")


@pytest.mark.parametrize("head, tail, real", [
    ((0.80, 0.70, 0.82), (0.70, 0.69, 0.72), False),  # 10 points; sqrt(10^2 + 2^2) = 10.2
    ((0.80, 0.78, 0.90), (0.70, 0.60, 0.72), True),  # sqrt(2^2 + 2^2) = 2.8: the ends that face each other count
    ((0.80, 0.72, 0.82), (0.70, 0.69, 0.75), True),  # sqrt(8^2 + 5^2) = 9.4
])  # fmt: skip
def test_whether_a_gap_is_real_by_hand(single, head, tail, real):
    document = copy.deepcopy(single)
    for name, found in (("many", head), ("few", tail)):
        document["runs"][0]["metrics"][name] = dict(zip(("value", "low", "high"), found, strict=True))
    assert gap_is_real(View(document), 0) is real


@pytest.mark.parametrize("overall, head, tail, says", [
    ((0.05, 0.04), (-0.03, -0.04), (0.1, 0.08),
     ["Both differences are real", "It costs 3.0 points (−4.0 to −2.0) on many-shot"]),
    ((0.05, 0.04), (0.1, 0.08), (-0.1, -0.12),
     ["all classes. The difference is real", "It also gains 10.0 points (+8.0 to +12.0) on many-shot",
      "It costs 10.0 points (−12.0 to −8.0) on few-shot"]),
    ((0.01, -0.02), (0.0, -0.02), (0.1, 0.08), ["it may be 0", "no difference can be told: 0.0 points, interval −2.0 to +2.0",
                                               "It also gains 10.0 points (+8.0 to +12.0) on few-shot"]),
])  # fmt: skip
def test_what_the_best_run_costs_and_gains(several, overall, head, tail, says):
    """A loss on the rare classes is told, and never called a gain; ``overall``, ``head``, ``tail``: value and low."""
    document = copy.deepcopy(several)
    for metric, (value, low) in zip(("balanced_accuracy", "many", "few"), (overall, head, tail), strict=True):
        high = 2 * value - low
        document["differences"][0]["metrics"][metric] = {"value": value, "low": low, "high": high, "real": low > 0 or high < 0}
    told = " ".join(verdict_of(document)[:2])
    assert all(words in told for words in says), told
    assert told.count("on few-shot") == sum("on few-shot" in words for words in says)


def test_a_command_of_the_advice_survives_the_shell(single):
    import shlex

    advice = verdict_of(changed_run(single, run="/runs/a b; rm -rf $HOME"))[2]
    line = re.search("balms retrain .*? --meta-sampler", advice)[0]
    from html import unescape

    assert shlex.split(unescape(line))[2] == "/runs/a b; rm -rf $HOME"


def test_elements_escape_what_is_in_them():
    assert tag("p", "<b>&\"'", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;&quot;&#x27;</p>'
    assert escape(escape("<")) == "&lt;" and escape("a\0b\ud800") == "a\\x00b\\ud800"
    assert tag("a", hidden=False, open=True, class_=None) == "<a open></a>"
    assert named("x" * 50, 10) == f'<bdi title="{"x" * 50}">{"x" * 9}…</bdi>'
    numbers = Numbers({"a.b": {"~c": [0.12345, None]}})
    assert numbers.percent("a.b", "~c", 0) == '<data data-path="a~1b.~0c.0" value="0.12345">12.3</data>'
    assert look_up(numbers.document, "a~1b.~0c.0") == 0.12345
    assert "<data" not in numbers.percent("a.b", "~c", 1) and "<data" not in numbers.percent("nothing", 3)


@pytest.mark.slow
def test_ten_thousand_classes(tmp_path, slow_png):
    import time

    k = 10_000
    labels = np.repeat(np.arange(k), 5)
    manifest = make_manifest(long_tail(k, 5000, 5000), labels, names=[f"species {c} of some genus" for c in range(k)])
    rng = np.random.default_rng(0)
    scored = []
    for i in range(3):
        right_N = rng.random(len(labels)) < np.linspace(0.9, 0.2 + 0.1 * i, k)[labels]
        predicted_N = np.where(right_N, labels, (labels * rng.random(len(labels))).astype(int))
        scores = Scores(predicted_N, rng.uniform(0.1, 1, len(labels)), np.where(right_N, 0, 7), rng.dirichlet(np.ones(k)))
        scored.append(make_scored(manifest, scores, run=f"/runs/{i}"))
    document = build(scored)
    began = time.monotonic()
    page = write_page(document, scored, tmp_path)
    assert time.monotonic() - began < 60
    assert page.stat().st_size < 5_000_000
    read = Page(page.read_text())
    check_numbers(read, document)
    assert len(read.all("tr")) < 300 and "classes.csv" in read.one("section", id="classes").text
