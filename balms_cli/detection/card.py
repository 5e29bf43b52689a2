"""``MODEL_CARD.md`` of a detector: what it is, what it was made from, and what it is not, in the run's own figures."""

from collections import Counter
from typing import Any

from ..report.card import fenced, markdown, names_of, table_of, value_text
from .header import DetectHeader

_GROUPS = {"r": "rare (1 to 10 images)", "c": "common (11 to 100)", "f": "frequent (over 100)"}
_SHOWN = 40  # categories in the table, half of them from each end


def detector_card(header: DetectHeader, report: dict[str, Any], sources: dict[str, str], command: str) -> str:
    """The card as Markdown. ``sources``: where each value of the recipe came from; ``command``: what was typed."""
    return "\n\n".join([_what(header, report), _data(header), _training(header, report, sources, command), _use(header),
                        _limits(header)]) + "\n"  # fmt: skip


def _what(header: DetectHeader, report: dict[str, Any]) -> str:
    arch, tuned = header.architecture, header.stage == "detect-finetune"
    kind = "Mask R-CNN" if arch.masks else "Faster R-CNN"
    task = "image-segmentation" if arch.masks else "object-detection"
    head = f"---\nlibrary_name: balms\npipeline_tag: {task}\ntags:\n- {task}\n- long-tailed-recognition\n---"
    text = (f"{kind} on a feature pyramid over {markdown(arch.backbone)}, made by `balms {header.stage.replace('-', ' ', 1)}` "
            f"(balms {report.get('versions', {}).get('balms', 'unknown')}) on {header.created[:10]}. ")  # fmt: skip
    if tuned:
        learned = " with category weights that the Meta Reweigher learned" if header.rates else ""
        text += (f"Its box classifier was tuned by the {markdown(header.loss)} loss{learned}; all else is bit for bit that of "
                 f"the detector that it began with (sha256 `{header.parent_sha256}`).")  # fmt: skip
    else:
        text += f"All of it was trained together, its box classifier by the {markdown(header.loss)} loss."
    return f"{head}\n\n# {kind} for {_counted(len(header.categories))}\n\n{text}"


def _counted(count: int) -> str:
    return f"{count:,} {'category' if count == 1 else 'categories'}"


def _data(header: DetectHeader) -> str:
    by_group = Counter(c.frequency for c in header.categories)
    images = sorted(header.categories, key=lambda c: (-c.image_count, c.name))
    rows = [("categories", f"{len(images):,}"), ("training images", f"{header.num_images:,}"),
            ("instances", f"{sum(c.instance_count for c in images):,}"),
            ("images of a category", f"{images[0].image_count:,} down to {images[-1].image_count:,}"),
            *((words, _counted(by_group[group])) for group, words in _GROUPS.items()),
            ("annotations sha256", f"`{header.annotations_sha256}`")]  # fmt: skip
    half = _SHOWN // 2
    shown = images if len(images) <= _SHOWN else [*images[:half], None, *images[-half:]]
    each = [("...", "", "") if c is None else (markdown(c.name), f"{c.image_count:,}", f"{c.instance_count:,}") for c in shown]
    return f"## Data\n\n{table_of(('data', ''), rows)}\n\n{table_of(('category', 'training images', 'instances'), each)}"


def _training(header: DetectHeader, report: dict[str, Any], sources: dict[str, str], command: str) -> str:
    known = {"steps": "steps", "seconds": "seconds", "final_loss": "loss at the end", "peak_memory_gb": "peak memory in GB",
             "device": "device", "seed": "seed"}  # fmt: skip
    facts = [(words, value_text(report[key])) for key, words in known.items() if report.get(key) is not None]
    facts.append(("versions", markdown(", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()))))
    own = {"annotations", "images"}  # paths of one machine
    chosen = [(f"`{key}`", value_text(header.recipe.get(key)), markdown(source)) for key, source in sources.items()
              if source != "default" and key not in own and key in header.recipe]  # fmt: skip
    return "\n\n".join(["## Training", table_of(("training", ""), facts),
                        "Values that a preset, a file or an option set (config.toml has all of them):",
                        table_of(("value", "", "set by"), chosen), "The command, in its own words:",
                        fenced(command, "sh")])  # fmt: skip


def _use(header: DetectHeader) -> str:
    shell = ("balms detect predict RUN photos/    # RUN: this folder; pictures with boxes, names and scores\n"
             "balms detect evaluate RUN --data JSON    # LVIS metrics")  # fmt: skip
    if header.architecture.family == "softmax":
        scores = "A score is the softmax over the categories and the background: the scores of a box sum to less than one."
    else:
        scores = "A score is a sigmoid, a category at a time: the scores of a box do not sum to one."
    return (f"## Use\n\n{fenced(shell, 'sh')}\n\n## What the scores mean\n\n{scores} Priors acted in training alone, on "
            "regions with an object; raw scores are used as they come. They are not calibrated: a score of 0.9 need not be "
            "right nine times in ten.")  # fmt: skip


def _limits(header: DetectHeader) -> str:
    rare = sorted((c for c in header.categories if c.frequency == "r"), key=lambda c: (c.image_count, c.name))
    arch = header.architecture
    points = [f"It looks for the {_counted(len(header.categories))} above and for nothing else.",
              f"An image is shown to it with a shorter side of {arch.test_size} px, the longer one at most {arch.max_size}: "
              "what is a few pixels large then is not found."]  # fmt: skip
    if rare:
        points.append(f"Rare categories, learned from few images ({len(rare):,} of {len(header.categories):,}): "
                      f"{names_of([f'{c.name} ({c.image_count})' for c in rare])}.")  # fmt: skip
    if (start := header.recipe.get("weights")) is not None:
        points.append(f"The backbone began with weights from elsewhere ({markdown(str(start))}).")
    points.append("How the images were collected, whom or what they show and whether they may be used is not known to balms.")
    parts = ["## Limits\n", *(f"- {point}" for point in points), "\n## Licence\n",
             "balms sets no licence for these weights: whoever publishes them chooses one, within the terms of the data and of "
             "initial weights."]  # fmt: skip
    if "balanced" in header.loss:
        parts += ["\n## Reference\n", "Method: J. Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, "
                  "NeurIPS 2020."]  # fmt: skip
    return "\n".join(parts)
