"""``MODEL_CARD.md``: what a run's classifier is, what it was made from, and what it is not, in the run's own figures.

Everything in it follows from the run's header, report and configuration: nothing is promised that balms did not do or see.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.aside import printable
from ..data.longtail import FEW_BELOW, GROUPS, MANY_ABOVE, shot_groups
from ..data.manifest import Manifest
from ..engine.header import Header
from .html import plural, unturned

_SHOWN = 40  # classes in the table, half of them from each end
_NAMED = 20  # classes named in a sentence
_LOSSES = {
    "softmax": "softmax cross-entropy", "balanced": "Balanced Softmax", "balanced-sigmoid": "Balanced Sigmoid",
    "tau-norm": "none (rows of stage 1's classifier, rescaled)", "ncm": "none (means of the features)",
}  # fmt: skip
_CLASSIFIERS = {
    "lws": "A linear classifier (stage 1's, each row times a learned scale: LWS)", "ncm": "A nearest-class-mean classifier",
    "tau-norm": "A linear classifier (stage 1's, its rows tau-normalised)",
}  # fmt: skip
_SAMPLERS = {
    "instance": "every image as often as any other", "class": "every class as often as any other (class-balanced)",
    "square-root": "classes by the square root of their images", "progressive": "from image- to class-balanced in the course",
    "none": "no draws",
}  # fmt: skip

_LEARNED = {
    "reweigher": "class weights that the Meta Reweigher learned", "l2rw": "example weights that L2RW learned",
    "meta-weight-net": "example weights that Meta-Weight-Net learned",
}  # fmt: skip


def model_card(header: Header, report: dict[str, Any], recipe: dict[str, dict[str, Any]], made: dict[str, Any],
               manifest: Manifest, parameters: int, parent: Header | None = None) -> str:  # fmt: skip
    """The card as Markdown, with the YAML head that model hubs read.

    ``recipe``, ``made``: see :func:`run_files.recipe` and :func:`run_files.provenance`; ``parent``: of the run that the
    backbone comes from; ``parameters``: numbers in the network.
    """
    trained = header.head != "untrained"
    parts = [_front_matter(header, trained), _what(header, report, parameters, parent, trained), _data(header, manifest),
             _training(header, report, recipe, made), _use(trained)]  # fmt: skip
    if trained:
        meaning = re.sub("--target-prior( uniform)?", r"`\g<0>`", implied_prior(header, markdown))
        parts.append(f"## What the scores mean\n\n{meaning}\n\n{_calibration(manifest)}")
        parts.append(_limits(header, manifest, parent))
    parts.append(_rest(header, parent, trained))
    return "\n\n".join(parts) + "\n"


def implied_prior(header: Header, shown: Callable[[str], str] = printable) -> str:
    """What the raw logits of a checkpoint mean, in a sentence: the class prior that they are meant for. ``shown``: how a
    name is written where the sentence stands."""
    if not header.prior_exact:
        return (f"Raw scores are meant for no class prior that could be written down ({shown(header.loss)} loss, "
                f"{shown(header.classifier)} classifier); --target-prior takes the training law for it.")  # fmt: skip
    log_C, counts_C = np.array(header.implied_log_prior), np.array(header.class_counts, dtype=np.float64)
    log_C = log_C - log_C.max()
    share_C = np.exp(log_C) / np.exp(log_C).sum()

    def is_law(law_C: np.ndarray) -> bool:
        return bool(np.allclose(share_C, law_C / law_C.sum(), rtol=1e-3, atol=0))

    if is_law(np.ones_like(counts_C)):
        return "Raw scores are meant for data where all classes are equally frequent; for other shares use --target-prior."
    otherwise = "; where all are equally frequent, use --target-prior uniform."
    if is_law(counts_C):
        return f"Raw scores are meant for data where classes are as frequent as in training{otherwise}"
    if is_law(1 / counts_C):
        return f"Raw scores are meant for data where the rare classes are frequent (shares 1/n: over-balanced){otherwise}"
    most, least = int(share_C.argmax()), int(share_C.argmin())
    return (
        f"Raw scores are meant for class shares of their own, from {100 * share_C[most]:.3g} % "
        f"({shown(header.classes[most])}) down to {100 * share_C[least]:.3g} % ({shown(header.classes[least])}){otherwise}"
    )


def markdown(text: str) -> str:
    """Text that Markdown shows as it stands, within a line or a table's cell: no markup, no HTML, no link."""
    special = r"[\\`*_{}\[\]<>#!|~&$@^:]|(?<=www)\."
    return re.sub(special, lambda found: "\\" + found[0], unturned(printable(text)), flags=re.IGNORECASE)


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever backticks are in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _front_matter(header: Header, trained: bool) -> str:
    task = "image-classification" if trained else "image-feature-extraction"
    tags = [task, "long-tailed-recognition", *(["balanced-softmax"] if header.loss == "balanced" else [])]
    return "\n".join(["---", "library_name: balms", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(header: Header, report: dict[str, Any], parameters: int, parent: Header | None, trained: bool) -> str:
    size, count, versions = header.image_size, len(header.classes), report.get("versions", {})
    name = f"# {markdown(header.backbone)} for {markdown(header.data['name'])}, {count} {plural(count, 'class')}"
    network = (f"{markdown(header.backbone)} ({parameters:,} parameters), which sees RGB images of {size} x {size} px, made by "
               f"`balms {header.stage}` (balms {versions.get('balms', 'unknown')}) on {header.created[:10]}.")  # fmt: skip
    if not trained:
        return f"{name}\n\nA feature extractor: {network} Nothing was trained, and its last layer is no classifier yet."
    head = f"{_CLASSIFIERS.get(header.classifier, f'A {header.head} classifier')} on the features of {network}"
    taught = f"Loss: {_loss(header)}. Batches: {_sampler(header)}."
    if parent is None:
        taught += " Backbone and classifier were trained together."
    elif parent.head == "untrained":
        taught += " The backbone was taken as it was: nothing in it was trained here."
    else:
        taught += (f" The backbone is that of an earlier run (loss: {_loss(parent)}; batches: {_sampler(parent)}), which "
                   "stayed as it was: decoupled training.")  # fmt: skip
    return f"{name}\n\n{head}\n\n{taught}"


def _loss(header: Header) -> str:
    return _LOSSES.get(header.loss, markdown(header.loss))


def _sampler(header: Header) -> str:
    if header.sampler.startswith("meta ("):
        return "drawn by class sample rates that the Meta Sampler learned"
    first, _, learned = header.sampler.partition(" + ")
    words = _SAMPLERS.get(first) or f"class sample rates of {markdown(first)}"
    return words + (f", with {_LEARNED.get(learned, markdown(learned))}" if learned else "")


def _data(header: Header, manifest: Manifest) -> str:
    counts, groups_C = np.array(header.class_counts), np.asarray(shot_groups(header.class_counts))
    rows = [("name", markdown(manifest.name)), ("source", markdown(manifest.source["name"])),
            ("classes", f"{len(counts):,}"), ("training images", f"{counts.sum():,}"),
            ("images a class", f"{counts.max():,} down to {counts.min():,}"),
            ("imbalance factor", f"{manifest.imbalance_factor:.4g}"),
            *((f"{split} images", f"{len(part):,}") for split, part in manifest.splits.items() if split != "train"),
            ("drawn with seed", str(manifest.seed)), ("index sha256", f"`{manifest.sha256}`")]  # fmt: skip
    limits = {"many": f"over {MANY_ABOVE} images", "medium": f"{FEW_BELOW} to {MANY_ABOVE}", "few": f"under {FEW_BELOW}"}
    members = {name: counts[groups_C == name] for name in GROUPS}
    by_group = [(f"{name}-shot ({limits[name]})", f"{len(found):,}", f"{found.sum():,}") for name, found in members.items()]
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], header.classes[c]))
    half = _SHOWN // 2
    shown = order if len(order) <= _SHOWN else [*order[:half], None, *order[-half:]]
    by_class = [("...", "", "") if c is None else (markdown(header.classes[c]), f"{counts[c]:,}", str(groups_C[c]))
                for c in shown]  # fmt: skip
    return "\n\n".join(["## Data", table_of(("data", ""), rows), table_of(("classes", "how many", "training images"), by_group),
                        table_of(("class", "training images", "group"), by_class)])  # fmt: skip


def _training(header: Header, report: dict[str, Any], recipe: dict[str, dict[str, Any]], made: dict[str, Any]) -> str:
    known = {"steps": "steps", "seconds": "seconds", "images_per_second": "images a second", "final_loss": "loss at the end",
             "tau_norm": "tau", "tau_chosen_on": "tau chosen on", "rates_variance": "variance of the learned rates",
             "device": "device"}  # fmt: skip
    facts = [(words, value_text(report[key])) for key, words in known.items() if report.get(key) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    facts += [("seed", value_text(report.get("seed"))), ("preset", value_text(made.get("preset"))),
              ("versions", markdown(versions))]  # fmt: skip
    if header.parent_sha256:
        facts.append(("started from sha256", f"`{header.parent_sha256}`"))
    chosen = [(f"`{key}`", value_text(entry["value"]), markdown(entry["source"] or "unknown")) for key, entry in recipe.items()
              if entry["source"] != "default"]  # fmt: skip
    parts = ["## Training", table_of(("training", ""), facts)]
    if chosen:
        parts += ["Values that a preset, a file or an option set (config.toml has all of them):",
                  table_of(("value", "", "set by"), chosen)]  # fmt: skip
    if made.get("command"):
        parts += ["The command, in its own words:", fenced(str(made["command"]), "sh")]
    return "\n\n".join(parts)


def _use(trained: bool) -> str:
    if not trained:
        return "## Use\n\n" + fenced("balms retrain RUN    # gives it a classifier; RUN: this folder", "sh")
    shell = ("balms predict RUN photos/    # RUN: this folder; the likeliest classes of each image\n"
             "balms evaluate RUN           # accuracy on the test split of its data")  # fmt: skip
    python = ('from balms_cli.stages.predict import load\n\nfor image in load("RUN").predict(["photo.jpg"]):\n'
              "    print(image.path, image.error or (image.classes, image.scores))")  # fmt: skip
    return f"## Use\n\n{fenced(shell, 'sh')}\n\n{fenced(python, 'python')}"


def _calibration(manifest: Manifest) -> str:
    if val := len(manifest.splits.get("val", ())):
        return f"`balms predict` scales them by a temperature that it fits on the {val:,} validation images of the data."
    return "They are not calibrated: the data has no validation split, and a score of 0.9 need not be right nine times in ten."


def _limits(header: Header, manifest: Manifest, parent: Header | None) -> str:
    counts, size = header.class_counts, header.image_size
    few = sorted((c for c in range(len(counts)) if counts[c] < FEW_BELOW), key=lambda c: (counts[c], header.classes[c]))
    points = [f"Every image gets one of the {len(counts):,} classes, an image of none of them too.",
              f"It sees the centre square of an image, at {size} x {size} px; the training images were of about "
              f"{manifest.image_size[0]} x {manifest.image_size[1]} px."]  # fmt: skip
    if few:
        names = names_of([f"{header.classes[c]} ({counts[c]})" for c in few])
        points.append(f"{len(few):,} of {len(counts):,} {plural(len(counts), 'class')} {'was' if len(few) == 1 else 'were'} "
                      f"learned from fewer than {FEW_BELOW} images: {names}. What else such a class can look like, it has "
                      "not seen.")  # fmt: skip
    if manifest.untested:
        points.append(f"No test images, so that nothing can be said of them: {names_of(manifest.untested)}.")
    start = (parent or header).recipe.get("weights")
    if start is not None:
        points.append(f"The backbone began with weights from elsewhere ({markdown(str(start))}): what they were trained on is "
                      "in it.")  # fmt: skip
    points.append("How the images were collected, whom or what they show and whether they may be used is not known to balms.")
    task = "Telling the classes above apart in images like those of its data, by their look alone."
    return "\n".join(["## Intended use and limits", "", task, "", *(f"- {point}" for point in points)])


def _rest(header: Header, parent: Header | None, trained: bool) -> str:
    evaluated = ("No test figures stand in this card, as training reads no test images. `balms evaluate RUN` gives them, "
                 "`--report out/` as a page with intervals." if trained else "There is nothing to test yet.")  # fmt: skip
    terms = "those of the data" + (" and of the initial weights" if (parent or header).recipe.get("weights") else "")
    licence = (f"balms sets no licence for these weights: whoever publishes them chooses one, within terms such as {terms}. "
               "(On a model hub, add `license:` to the head of this file.)")  # fmt: skip
    paper = ("Method: J. Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020."
             if "balanced" in header.loss or "meta" in header.sampler else "")  # fmt: skip
    return "\n\n".join(["## Test figures", evaluated, "## Licence", licence, *(["## Reference", paper] if paper else [])])


def names_of(names: list[str]) -> str:
    shown = ", ".join(markdown(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED:,} more"


def value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item) for item in value) or "none"
    return f"{value:,}" if isinstance(value, int) else markdown(str(value))


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---", *("--:" if len(head) == 3 and i == 1 else "---" for i in range(1, len(head)))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
