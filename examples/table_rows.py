"""The rows of the paper's tables: which network of stage 1, what stage 2 adds, how it is scored. Data, no code."""

from dataclasses import dataclass, field
from typing import Any

# Stage 1: what differs from the preset. A logit-adjusted network is a Balanced Softmax one, so they share it.
BACKBONES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "cbs": {"sampler": "class"},
    "balanced": {"loss": "balanced"},
    "balanced-quarter": {"loss": "balanced", "loss_exponent": 0.25},
    "cost-sensitive": {"loss": "cost-sensitive"},
    "focal": {"loss": "focal"},
    "class-balanced": {"loss": "class-balanced"},
    "class-balanced-sigmoid": {"loss": "class-balanced-sigmoid"},
    "class-balanced-focal": {"loss": "class-balanced-focal"},
    "ldam": {"loss": "ldam"},
    "ldam-drw": {"loss": "ldam", "drw": True},
    "equalization": {"loss": "equalization"},
    "l2rw": {"reweight": "l2rw"},
    "meta-weight-net": {"reweight": "meta-weight-net"},
    # The same recipe on a draw that leaves validation images out: where tau-norm's tau is chosen.
    "softmax-val": {},
}
VAL_PER_CLASS = {"cifar10": 100, "cifar100": 20}
WITH_META_SET = ("l2rw", "meta-weight-net")


@dataclass(frozen=True)
class Row:
    """A line of a table: its stage 1, what stage 2 adds (None: the stage-1 network itself), how it is scored."""

    name: str
    label: str
    tables: tuple[str, ...]
    backbone: str
    head: dict[str, Any] | None = None
    score: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    table3: str = ""  # what Table 3 calls it

    @property
    def random_head(self) -> bool:
        """Does a classifier seed make a difference?"""
        return self.head is not None and self.head.get("classifier") not in ("ncm", "tau-norm")


T2, ABLATION, T3 = ("table2",), ("ablation",), ("table3",)
ROWS = (
    Row("softmax", "Softmax", T2, "softmax"),
    Row("cost-sensitive", "Cost-sensitive (CBW)", T2, "cost-sensitive"),
    Row("cbs", "Class-balanced sampling (CBS)", T2 + ABLATION, "cbs"),
    Row("focal", "Focal", T2, "focal"),
    Row("class-balanced", "Class-balanced loss", T2, "class-balanced"),
    Row("class-balanced-sigmoid", "Class-balanced, sigmoid form", T2, "class-balanced-sigmoid"),
    Row("class-balanced-focal", "Class-balanced, focal form", T2, "class-balanced-focal"),
    Row("ldam", "LDAM", T2, "ldam"),
    Row("ldam-drw", "LDAM-DRW", T2, "ldam-drw"),
    Row("equalization", "Equalization (softmax form)", T2, "equalization", note="CIFAR values of another repository"),
    Row("l2rw", "L2RW", T2, "l2rw"),
    Row("meta-weight-net", "Meta-Weight-Net", T2, "meta-weight-net"),
    Row("posthoc", "Softmax, post-hoc logit adjustment", T2, "softmax", score={"posthoc_tau": 1.0}),
    Row("logit-adjusted", "Logit-adjusted loss", T2, "balanced", note="the same function as Balanced Softmax"),
    Row("ncm", "NCM", T2, "softmax", {"classifier": "ncm"}),
    Row("tau-norm", "tau-norm", T2, "softmax", {"classifier": "tau-norm"}, note="tau from a validation draw"),
    Row("cosine", "Cosine classifier, CBS", T2, "softmax", {"classifier": "cosine", "loss": "softmax", "sampler": "class"}),
    Row("crt", "cRT (linear, CBS)", T2 + ABLATION + T3, "softmax", {"loss": "softmax", "sampler": "class"},
        table3="features softmax, classifier CBS"),
    Row("lws", "LWS", T2, "softmax", {"classifier": "lws"}),
    Row("balms", "BALMS (Balanced Softmax, DT, MS)", T2 + ABLATION, "softmax", {"loss": "balanced", "meta_sampler": True}),
    Row("balanced-quarter", "Balanced Softmax 1/4, end to end", ABLATION, "balanced-quarter"),
    Row("balanced", "Balanced Softmax, end to end", ABLATION, "balanced"),
    Row("balanced-quarter-dt", "Balanced Softmax 1/4, DT", ABLATION, "softmax", {"loss": "balanced", "loss_exponent": 0.25}),
    Row("balanced-quarter-dt-ms", "Balanced Softmax 1/4, DT, MS", ABLATION, "softmax",
        {"loss": "balanced", "loss_exponent": 0.25, "meta_sampler": True}),
    Row("balanced-dt", "Balanced Softmax, DT", ABLATION + T3, "softmax", {"loss": "balanced"},
        table3="features softmax, classifier Balanced Softmax"),
    Row("balanced-cbs-dt", "Balanced Softmax, CBS, DT", ABLATION, "softmax", {"loss": "balanced", "sampler": "class"}),
    Row("softmax-dt-ms", "Softmax, DT, MS", ABLATION, "softmax", {"loss": "softmax", "meta_sampler": True}),
    Row("balanced-dt-mr", "Balanced Softmax, DT, MR", ABLATION, "softmax", {"loss": "balanced", "meta_reweigher": True}),
    Row("softmax-dt", "features softmax, classifier softmax", T3, "softmax", {"loss": "softmax"}),
    Row("cbs-softmax", "features CBS, classifier softmax", T3, "cbs", {"loss": "softmax"}),
    Row("bs-softmax", "features Balanced Softmax, classifier softmax", T3, "balanced", {"loss": "softmax"}),
    Row("cbs-crt", "features CBS, classifier CBS", T3, "cbs", {"loss": "softmax", "sampler": "class"}),
    Row("bs-crt", "features Balanced Softmax, classifier CBS", T3, "balanced", {"loss": "softmax", "sampler": "class"}),
    Row("cbs-balanced", "features CBS, classifier Balanced Softmax", T3, "cbs", {"loss": "balanced"}),
    Row("bs-balanced", "features Balanced Softmax, classifier Balanced Softmax", T3, "balanced", {"loss": "balanced"}),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
TITLES = {
    "table2": "Comparison (main text, Table 2; supplement, Table 2)",
    "ablation": "Ablation (main text, Table 5): DT decoupled training, MS meta sampler, MR meta reweigher",
    "table3": "Features against classifiers (supplement, Table 3)",
}
