"""The report's document as the page looks at it: which runs a figure shows, in what order classes stand, what is flat."""

from functools import cached_property
from typing import Any

from ..metrics import GROUPS
from .html import isolated, shorten
from .palette import RUNS

GROUP_WORDS = {"top1": "top-1", "top5": "top-5", "balanced_accuracy": "all classes", "many": "many-shot",
               "medium": "medium-shot", "few": "few-shot", "rarest3": "3 rarest"}  # fmt: skip


class View:
    """A document with what several parts of the page ask of it. Shapes: C classes."""

    def __init__(self, document: dict[str, Any]):
        self.document = document
        self.runs: list[dict[str, Any]] = document["runs"]

    @cached_property
    def order(self) -> list[int]:
        """Classes by decreasing training images of the scored data, ties in the order of the data."""
        counts = self.document["data"]["train_counts"]
        return sorted(range(len(counts)), key=lambda c: -counts[c])

    @cached_property
    def shown(self) -> list[int]:
        """Runs that figures show: all, or the first and the best by accuracy over all classes, in the order given."""
        if len(self.runs) <= RUNS:
            return list(range(len(self.runs)))
        best = sorted(range(1, len(self.runs)), key=lambda i: -(self.value(i, "balanced_accuracy") or 0))[: RUNS - 1]
        return sorted([0, *best])

    @cached_property
    def blocks(self) -> list[str]:
        """Metrics of the group figure that some run has: the groups, the three rarest where there is no few-shot class, all."""
        there = [m for m in GROUPS if any(run["metrics"][m] for run in self.runs)]
        rare = ["rarest3"] if "few" not in there and any(run["metrics"]["rarest3"] for run in self.runs) else []
        return [*there, *rare, "balanced_accuracy"]

    @cached_property
    def best(self) -> int:
        """The run with the highest accuracy over all classes; the first of equals."""
        return max(range(len(self.runs)), key=lambda i: (self.value(i, "balanced_accuracy") or 0, -i))

    @property
    def balanced_test(self) -> bool:
        return all(run["marginal"]["note"] is None for run in self.runs)

    def value(self, run: int, metric: str) -> float | None:
        found = self.runs[run]["metrics"][metric]
        return None if found is None else found["value"]

    def of(self, run: int, key: str) -> list:
        """``train_counts``, ``test_counts`` or ``group_of`` of a run: its own where it has any, else those of the data."""
        own = self.runs[run][key]
        return self.document["data"][key] if own is None else own

    def difference(self, run: int) -> dict[str, Any] | None:
        """The paired difference of a run to the first."""
        name = self.runs[run]["name"]
        return next((d for d in self.document["differences"] if d["run"] == name), None)

    def ends(self, run: int) -> tuple[str, str] | None:
        """The most and the least frequent shot group that were tested; None where there are not two."""
        there = [group for group in GROUPS if self.runs[run]["metrics"][group] is not None]
        return (there[0], there[-1]) if len(there) > 1 else None

    def tilt(self, run: int) -> float | None:
        """How much of its fair part the rarest group gets in p(y), over what the most frequent group gets: 1 is balanced,
        below it the scores favour the head. A class's fair part is its share of the test images. None: one group only.
        """
        ends = self.ends(run)
        if ends is None:
            return None
        head, tail = (self.runs[run]["marginal"]["per_share"][group] for group in ends)
        return None if tail is None or not head else tail / head

    def curves(self, stage: str) -> list[tuple[int, str, dict[str, Any]]]:
        """Distinct training curves of a stage: place among the shown runs, the run's name, and the curve."""
        found: list[tuple[int, str, dict[str, Any]]] = []
        own = [(place, self.runs[i]["name"], self.runs[i]["curves"]) for place, i in enumerate(self.shown)]
        parents = [(place, f"below {self.runs[i]['name']}", self.runs[i]["parent_curves"])
                   for place, i in enumerate(self.shown)]  # fmt: skip
        for place, name, curve in own + parents:
            if curve is not None and curve["stage"] == stage and all(curve != known for *_, known in found):
                found.append((place, name, curve))
        return found

    def file(self, name: str, run: int) -> str:
        """A figure's file name: numbered by the run where there are several. Never a stranger's text."""
        return name if len(self.runs) == 1 else f"{name}-{run + 1}"

    def titled(self, title: str, run: int) -> str:
        if len(self.runs) == 1:
            return title
        return f"{isolated(shorten(self.runs[run]['name'], 28))}: {title[0].lower()}{title[1:]}"
