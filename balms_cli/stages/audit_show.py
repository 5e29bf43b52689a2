"""How ``balms audit`` shows its facts on stderr."""

import math
import textwrap
from typing import Any

from ..reporter import Reporter

_ROWS = 20  # classes shown in the table
_MARKS = "▁▂▃▄▅▆▇█"
_CURVE = 60  # characters


def show(document: dict[str, Any], reporter: Reporter) -> None:
    """Counts, the tail, the files, findings and advice; for people, so no number stands here alone."""
    splits, tail = list(document["splits"]), document["tail"]
    classes = sorted(document["per_class"], key=lambda one: -one[splits[0]])
    unread = any(one["unreadable"] for one in classes)
    half = _ROWS // 2
    shown = classes if len(classes) <= _ROWS else [*classes[:half], None, *classes[-half:]]
    columns = ["class", *splits, *(["unreadable"] if unread else []), "group"]
    rows = [["..."] + [""] * (len(columns) - 1) if one is None else
            [one["name"], *(f"{one[split]:,}" for split in splits), *([f"{one['unreadable']:,}"] if unread else []),
             one["group"] or "none"] for one in shown]  # fmt: skip
    sizes = ", ".join(f"{n:,} {split}" for split, n in document["splits"].items())
    reporter.note(f"{document['name']}: {len(classes):,} classes; images: {sizes}")
    reporter.table("images a class", columns, rows)
    reporter.table("tail", ["figure", "value"], _tail(tail, [one[splits[0]] for one in classes]))
    if files := _files(document):
        reporter.table("files", ["figure", "value"], files)
    for one in document["findings"]:
        say = reporter.warn if one["level"] == "problem" else reporter.note
        lead = ["    such as ", "            ", "            "]
        say("\n".join([one["message"], *(before + short(such) for before, such in zip(lead, one["examples"], strict=False))]))
    for number, one in enumerate(document["advice"], 1):
        lines = [f"{number}. {one['do']}", *_wrapped(one["why"]), *_wrapped(f"Source: {one['source']}")]
        reporter.note("\n".join([*lines, *(f"     $ {command}" for command in one["commands"])]))
    checked = document["checked"]
    left = [] if checked["decoded"] else ["images were not decoded"]
    left += [] if checked["hashed"] else ["twins were not looked for (--hash)"]
    problems, notes = document["problems"], len(document["findings"]) - document["problems"]
    told = [f"{problems} problem{'s' * (problems != 1)}", f"{notes} note{'s' * (notes != 1)}", f"{document['seconds']:.1f} s"]
    reporter.note("; ".join([", ".join(told), *left]))


def short(text: str, most: int = 200) -> str:
    """A path may have 4,096 characters: the middle of a long text is left out."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _wrapped(text: str) -> list[str]:
    text = text[0].upper() + text[1:]
    return textwrap.wrap(text, 112, initial_indent="   ", subsequent_indent="   ", break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def _tail(tail: dict[str, Any], counts: list[int]) -> list[list[str]]:
    if not tail["images"]:
        return [["training images", "0"]]
    head = max(1, math.ceil(round(tail["head_classes"] * (tail["classes"] - tail["empty"]), 9)))
    groups = tail["groups"]
    return [
        ["training images", f"{tail['images']:,}"],
        ["largest, smallest class", f"{tail['largest']:,}, {tail['smallest']:,}"],
        ["imbalance factor", f"{tail['imbalance_factor']:.4g}"],
        ["Gini", f"{tail['gini']:.2f}"],
        [f"in the largest 10 % of classes ({head})", f"{100 * tail['head_share']:.0f} %"],
        ["many-shot (over 100)", _group(groups["many"])], ["medium-shot (20 to 100)", _group(groups["medium"])],
        ["few-shot (under 20)", _group(groups["few"])],
        *([["without a training image", f"{tail['empty']:,} classes"]] if tail["empty"] else []),
        ["images a class, log scale", curve(counts)],
    ]  # fmt: skip


def _group(group: dict[str, int]) -> str:
    k, n = group["classes"], group["images"]
    return f"{k:,} class{'es' * (k != 1)}, {n:,} image{'s' * (n != 1)}"


def curve(counts: list[int], width: int = _CURVE) -> str:
    """Counts as a line of blocks, from a class with one image (▁) to the largest (█), in log scale; '·' is no image.

    More than ``width`` classes share marks: each shows the geometric mean of its classes.
    """
    top = math.log(max([*counts, 1])) or 1.0
    marks = []
    for i in range(min(width, len(counts))):
        part = counts[i * len(counts) // min(width, len(counts)) : (i + 1) * len(counts) // min(width, len(counts))]
        used = [math.log(n) for n in part if n > 0]
        marks.append(_MARKS[min(7, int(8 * sum(used) / len(used) / top))] if used else "·")
    return "".join(marks)


def _files(document: dict[str, Any]) -> list[list[str]]:
    images, rows = document["images"], []
    if images:
        for name, key in (("width", "width"), ("height", "height"), ("shorter side", "shorter_side")):
            of = images[key]
            rows.append([f"{name}, px: smallest, median, largest", f"{of['q0']:,}, {of['q50']:,}, {of['q100']:,}"])
        aspect = images["aspect"]
        rows.append(["longer / shorter side: median, largest", f"{aspect['q50']:.2f}, {aspect['q100']:.2f}"])
        rows.append(["modes", ", ".join(f"{n:,} {mode}" for mode, n in images["modes"].items())])
        if images["formats"]:
            rows.append(["formats", ", ".join(f"{n:,} {name}" for name, n in images["formats"].items())])
            rows.append(["bytes", f"{images['bytes'] / 1e6:,.1f} MB"])
    twins = document["duplicates"]
    if document["checked"]["hashed"] or twins["groups"]:
        leak = sum(twins["train_test"]["images"].values())
        rows.append([f"twins, {twins['checked']}", f"{twins['groups']:,} groups, {twins['images']:,} images"])
        if leak:
            shared = ", ".join(f"{n:,} {split}" for split, n in twins["train_test"]["images"].items())
            rows.append(["of these in train and in test", shared])
    if document["unreadable"]["images"]:
        reasons = ", ".join(f"{reason} ({n:,})" for reason, n in list(document["unreadable"]["reasons"].items())[:5])
        rows.append(["unreadable", reasons])
    return rows
