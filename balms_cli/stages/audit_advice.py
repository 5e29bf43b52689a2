"""What to do with a data set: which methods can help at its tail, what to expect, why, who says so, and what to type.

Every figure has its source beside it. ``MEASURED`` are figures of the tables in examples/results (a test compares them),
``PAPER`` those of the paper; both are of CIFAR, and another data set will have its own.
"""

import os
import shlex
from dataclasses import dataclass
from typing import Any

from .. import presets
from ..config import AuditConfig
from ..data import aside, known
from ..data.audit import Listing
from ..data.folders import SPLIT_FOLDERS
from .audit_findings import NEAR_EMPTY, Finding

BALANCED = 2.0  # imbalance factors below: nothing to balance
MILD = 10.0  # below: the smallest factor that the paper measures, where the gain is about one point
_NO_IMAGE = {"empty", "untrained", "all-unreadable"}  # findings of classes without a training image
PRETRAINED_BELOW = 20_000  # photos; ours: ImageNet-LT, whose networks are trained from scratch, has 115,846

_RESULTS = "examples/results/tables_{}_if200_quick.json"
MEASURED_SOURCE = f"{_RESULTS.format('cifar10')} and {_RESULTS.format('cifar100')} (preset quick)"
# Accuracy in percent at imbalance factor 200, by set, row and figure.
MEASURED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "softmax": {"top1": 45.9, "rarest3": 0.7}, "posthoc": {"top1": 59.6, "rarest3": 43.1},
        "balanced-dt": {"top1": 62.1, "rarest3": 56.1}, "balms": {"top1": 62.1, "rarest3": 55.4},
        "crt": {"top1": 63.5, "rarest3": 57.1}, "balanced-cbs-dt": {"top1": 47.7, "rarest3": 80.0},
    },
    "cifar100": {
        "softmax": {"top1": 24.4, "many": 56.4, "few": 0.9, "rarest3": 0.0},
        "posthoc": {"top1": 29.3, "few": 8.7},
        "balanced-dt": {"top1": 30.9, "few": 14.4}, "balms": {"top1": 30.9, "many": 46.9, "few": 15.2, "rarest3": 4.8},
        "crt": {"top1": 30.9, "few": 16.2}, "balanced-cbs-dt": {"top1": 22.3, "few": 26.5},
    },
}  # fmt: skip
PAPER_SOURCE = "Ren et al., NeurIPS 2020, Table 2 (CIFAR-10-LT and CIFAR-100-LT, ResNet-32)"
ABLATION_SOURCE = "Ren et al., NeurIPS 2020, Table 5"
# Top-1 in percent, by imbalance factor, set and row.
PAPER: dict[int, dict[str, dict[str, float]]] = {
    200: {"cifar10": {"softmax": 71.2, "balms": 81.5}, "cifar100": {"softmax": 41.0, "balms": 45.5}},
    100: {"cifar10": {"softmax": 77.4, "balms": 84.9}, "cifar100": {"softmax": 45.3, "balms": 50.8}},
    10: {"cifar10": {"softmax": 90.0, "balms": 91.3}, "cifar100": {"softmax": 61.9, "balms": 63.0}},
}
# The same at imbalance factor 200, of Table 5.
ABLATION = {"cifar10": {"balanced-dt": 78.6, "balms": 81.5, "balanced-cbs-dt": 80.6},
            "cifar100": {"balanced-dt": 45.1, "balms": 45.5, "balanced-cbs-dt": 42.0}}  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """``do``: in one line; ``why``: the reason and what to expect; ``source`` of it; ``commands`` to type, in order."""

    do: str
    why: str
    source: str
    commands: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"do": self.do, "why": self.why, "source": self.source, "commands": self.commands}


def advise(listing: Listing, document: dict[str, Any], found: list[Finding], config: AuditConfig) -> list[Advice]:
    """Advice for a data set of which ``document`` tells the facts (see ``audit.run``), what comes first first.

    ``config``: how the data was named, to be said in the commands as well.
    """
    tail, kinds = document["tail"], {one.kind for one in found}
    factor, few = tail["imbalance_factor"], tail["groups"]["few"]["classes"]
    source = _source(listing, config)
    advice = _mend(listing, source, found, kinds)
    if factor is None or tail["classes"] - tail["empty"] < 2:
        return advice
    steps = _steps(listing, source, kinds)
    if factor < BALANCED:
        advice.append(_near_balanced(listing, source, factor, few == tail["classes"] - tail["empty"], steps))
    elif factor < MILD:
        advice.append(_mild(factor, steps))
    else:
        advice += [_tail(factor, few, steps), _meta_sampler(few), _not_both()]
    near = sum(0 < one[listing.splits[0]] < NEAR_EMPTY for one in document["per_class"])
    if near:
        advice.append(_near_empty(near))
    if "no-test" in kinds or "test-imbalanced" in kinds:
        advice.append(_test_split("no-test" in kinds, steps))
    if _photos(listing, document) and tail["images"] < PRETRAINED_BELOW:
        advice.append(_pretrained(tail["images"], steps))
    return advice


def _source(listing: Listing, config: AuditConfig) -> str:
    """The data as words of a command: what it is called, and the options that say how to read it."""
    root = config.data_root if listing.path in known.ARCHIVES else None
    options = [("--data-root", root), ("--images", config.images), ("--names", config.names)]
    words = [listing.path, *(word for option, given in options if given for word in (option, given))]
    return shlex.join(map(aside.printable, words)) + (" --leaf-classes" if config.leaf_classes else "")


def _mend(listing: Listing, source: str, found: list[Finding], kinds: set[str]) -> list[Advice]:
    advice = []
    listed = f"balms audit {source} --quiet --json | jq -r '.duplicates.list[] | "
    if "train-test-leak" in kinds:
        advice.append(Advice(
            "take the training images that are test images too out of the training set, before anything is measured",
            "they are answered from memory, and a rare class has so few test images that one of them moves its accuracy",
            "sha256 of the files; the command lists them",
            [listed + """select(any(.split == "test")) | .[] | select(.split == "train") | .path'"""]))  # fmt: skip
    if "two-labels" in kinds:
        advice.append(Advice(
            "decide for each image that stands under two labels which one is right",
            "each of them teaches the network a contradiction, and where the class is rare that is much of what it sees",
            "sha256 of the files; the command lists them",
            [listed + "select(map(.class) | unique | length > 1)'"]))  # fmt: skip
    if "copies" in kinds and "test" not in listing.splits:
        advice.append(Advice(
            "leave one of each set of copies, before make-lt cuts a test split from them",
            "an image in training and its copy in test is leakage that nobody sees later",
            "sha256 of the files; the command lists all but the first of each", [listed + ".[1:][] | .path'"]))  # fmt: skip
    stops = [one for one in found if one.stops]
    unreadable = {"unreadable", "refused"}
    if rest := [one for one in stops if one.kind not in unreadable]:  # first: --skip-bad does not get past these
        advice += _stops(listing, rest)
    if {one.kind for one in stops} & unreadable and "root-gone" not in kinds and not listing.manifest:
        advice.append(Advice("leave the unreadable files out, or bring them back",
                             "they stop make-lt unless it is told to leave them out", "what the files hold",
                             [f"balms make-lt {source} --as-is --skip-bad"]))  # fmt: skip
    return advice


def _stops(listing: Listing, found: list[Finding]) -> list[Advice]:
    """What to do about findings that make-lt, and so every command of the advice, stops at."""
    advice, kinds = [], {one.kind for one in found}
    if "root-gone" in kinds:
        advice.append(Advice("put the images back, or name the folder that holds them by BALMS_DATA",
                             "they are not where the manifest says, and nothing is read without them", "the manifest",
                             []))  # fmt: skip
    if kinds & _NO_IMAGE:
        bare = [name for name, n in zip(listing.classes, listing.counts()[0], strict=True) if not n]
        names = [aside.printable(_place(listing, name)) for name in bare]
        names += [name for one in found if one.kind == "all-unreadable" for name in one.examples]
        advice.append(Advice(f"give each of these training images, or remove it: {aside.name_some(names)}",
                             "a class without a training image cannot be learned by any loss or sampler; make-lt, and so the "
                             "commands below, stop at it", "log n of no image is minus infinity (eq 10)", []))  # fmt: skip
    if rest := [one for one in found if one.kind not in {*_NO_IMAGE, "root-gone"}]:
        advice.append(Advice(f"mend what make-lt stops at: {'; '.join(one.message for one in rest)}",
                             "labels must be beyond doubt before anything is trained", "make-lt", []))  # fmt: skip
    return advice


def _place(listing: Listing, name: str) -> str:
    """The folder of a class that has no training image, to be named where there is one; else the class's name."""
    folders = [os.path.join(listing.path, split, name) for split in ("", *(names[0] for names in SPLIT_FOLDERS), "test")]
    there = [folder for folder in folders if listing.kind == "folder" and os.path.isdir(folder)]
    return there[0] if there else name


def _steps(listing: Listing, source: str, kinds: set[str]) -> dict[str, list[str]]:
    """The commands of the stages, with this data in them."""
    if listing.manifest:
        first, given = [], f" {source}"
    else:
        skip = " --skip-bad" if kinds & {"unreadable", "refused"} else ""
        first, given = [f"balms make-lt {source} --as-is{skip}"], ""
    return {
        "make": first,
        "softmax": [*first, f"balms pretrain{given} --out runs/softmax"],
        "pretrained": [*first, f"balms pretrain{given} --backbone resnet18 --weights imagenet --out runs/softmax"],
        "balms": ["balms retrain runs/softmax --loss balanced --meta-sampler --out runs/balms"],
        "balanced": ["balms retrain runs/softmax --loss balanced --out runs/balanced"],
    }


def _near_balanced(listing: Listing, source: str, factor: float, all_few: bool, steps: dict[str, list[str]]) -> Advice:
    commands = [*steps["softmax"], "balms evaluate runs/softmax"]
    if listing.known:  # nobody audits CIFAR to train on all of it
        commands += [f"balms make-lt {source} --imbalance {40 if listing.path == 'digits' else 200}"]
    last = "; the last command makes a long tail of it" if listing.known else ""
    last += "; all classes have few images, which no balancing changes" if all_few else ""
    return Advice(
        f"plain softmax suffices: the classes are nearly balanced (imbalance factor {factor:.3g})",
        "with equal counts Balanced Softmax is softmax, and a class-balanced sampler draws as any other; what is here is "
        "gained by more images or a better backbone" + last,
        "eq 10: a constant log n changes nothing", commands)  # fmt: skip


def _published(factor: float) -> tuple[int, str]:
    """The published factor nearest to ``factor`` (as ratios), and what the paper found there."""
    nearest = min(PAPER, key=lambda one: max(one / factor, factor / one))
    ten, hundred = PAPER[nearest]["cifar10"], PAPER[nearest]["cifar100"]
    return nearest, (f"at imbalance factor {nearest} top-1 went from {ten['softmax']} to {ten['balms']} % on CIFAR-10 and from "
                     f"{hundred['softmax']} to {hundred['balms']} % on CIFAR-100")  # fmt: skip


def _mild(factor: float, steps: dict[str, list[str]]) -> Advice:
    _, published = _published(MILD)
    return Advice(
        f"start with softmax and adjust it afterwards: the tail is mild (imbalance factor {factor:.3g})",
        f"expect about one point or less: {published}, and this tail is shorter. The adjustment costs no training; "
        "retrain only if it gains",
        PAPER_SOURCE,
        [*steps["softmax"], "balms evaluate runs/softmax", "balms evaluate runs/softmax --posthoc-tau 1", *steps["balanced"],
         "balms evaluate runs/softmax runs/balanced"])  # fmt: skip


def _tail(factor: float, few: int, steps: dict[str, list[str]]) -> Advice:
    nearest, published = _published(factor)
    ten, hundred = MEASURED["cifar10"], MEASURED["cifar100"]
    why = f"softmax gives up the rare classes; {published}"
    if nearest >= 100:
        why += (f". With balms at factor 200: the three rarest of CIFAR-10 from {ten['softmax']['rarest3']} to "
                f"{ten['balms']['rarest3']} %, few-shot classes of CIFAR-100 from {hundred['softmax']['few']} to "
                f"{hundred['balms']['few']} %, many-shot ones down from {hundred['softmax']['many']} to "
                f"{hundred['balms']['many']} %")  # fmt: skip
    source = f"{PAPER_SOURCE}; {MEASURED_SOURCE}" if nearest >= 100 else PAPER_SOURCE
    what = f", {few} classes below 20 images" if few else ""
    return Advice(
        f"train the classifier anew with Balanced Softmax and the meta sampler (imbalance factor {factor:.4g}{what})",
        why + ". The head pays for the tail, so look at the groups, not at top-1 alone; your data will have its own figures",
        source,
        [*steps["softmax"], *steps["balms"], "balms evaluate runs/softmax runs/balms"])  # fmt: skip


def _meta_sampler(few: int) -> Advice:
    ten, hundred, ours = ABLATION["cifar10"], ABLATION["cifar100"], MEASURED["cifar100"]
    more = (f"; with balms, on few-shot classes of CIFAR-100, {ours['balanced-dt']['few']} without and "
            f"{ours['balms']['few']} % with it, and cRT {ours['crt']['few']} %" if few else "")  # fmt: skip
    more += f"; top-1 on CIFAR-10 the same, {MEASURED['cifar10']['balms']['top1']} %"
    return Advice(
        "compare with Balanced Softmax without the meta sampler, with cRT, and with softmax adjusted afterwards",
        f"what the meta sampler adds depends on the data: {ten['balanced-dt']} to {ten['balms']} % on CIFAR-10, "
        f"{hundred['balanced-dt']} to {hundred['balms']} % on CIFAR-100 in the paper{more}. Each costs seconds to minutes "
        "on the features of the same backbone",
        f"{ABLATION_SOURCE}; {MEASURED_SOURCE}",
        ["balms retrain runs/softmax --loss balanced --out runs/balanced",
         "balms retrain runs/softmax --loss softmax --sampler class --out runs/crt",
         "balms evaluate runs/softmax --posthoc-tau 1",
         "balms evaluate runs/softmax runs/balanced runs/crt runs/balms"])  # fmt: skip


def _not_both() -> Advice:
    def both(paper: dict[str, float], ours: dict[str, dict[str, float]]) -> str:
        return (f"from {paper['balanced-dt']} to {paper['balanced-cbs-dt']} % in the paper and from "
                f"{ours['balanced-dt']['top1']} to {ours['balanced-cbs-dt']['top1']} % with balms")  # fmt: skip

    return Advice(
        "leave --sampler class out where the loss is balanced",
        "the two together over-balance: the rare classes gain, and the others lose more; top-1 at factor 200 went on CIFAR-100 "
        f"{both(ABLATION['cifar100'], MEASURED['cifar100'])}, on CIFAR-10 {both(ABLATION['cifar10'], MEASURED['cifar10'])}",
        f"supplement A.5; {ABLATION_SOURCE}; {MEASURED_SOURCE}", [])  # fmt: skip


def _near_empty(near: int) -> Advice:
    ours = MEASURED["cifar100"]
    return Advice(
        f"collect images for the {near} classes with fewer than {NEAR_EMPTY}, or merge them into others",
        f"no method makes up for them: on the three rarest classes of CIFAR-100-LT (2 images each) balms reached "
        f"{ours['balms']['rarest3']} %, softmax {ours['softmax']['rarest3']} %",
        MEASURED_SOURCE, [])  # fmt: skip


def _test_split(missing: bool, steps: dict[str, list[str]]) -> Advice:
    if missing:
        return Advice(
            "bring a test split of your own, if you can: test/CLASS/* beside train/CLASS/*",
            "else make-lt sets 20 % of each class aside at random: near-copies (frames of a film, pictures of one session) "
            "then lie on both sides, and rare classes are left with very few test images or none",
            "our judgement", steps["make"])  # fmt: skip
    return Advice(
        "compare by balanced_accuracy and the groups; top-1 only where the test mix is the one that you will meet",
        "on an imbalanced test split top-1 pays for giving up rare classes. If that mix is what counts, scores for the "
        "training prior are right, and Balanced Softmax can be re-scored for it",
        "Menon et al., ICLR 2021: the Bayes rule of each mix", ["balms evaluate runs/balms --target-prior train"])  # fmt: skip


def _photos(listing: Listing, document: dict[str, Any]) -> bool:
    if not listing.has_files:
        return False
    size = tuple(listing.manifest.image_size) if listing.manifest else (0, 0)
    if document["images"]:
        size = (document["images"]["width"]["q50"], document["images"]["height"]["q50"])
    name = listing.manifest.source["name"] if listing.manifest else listing.name
    return presets.kind_of_data(name, size) == "photos" and not listing.known


def _pretrained(images: int, steps: dict[str, list[str]]) -> Advice:
    return Advice(
        f"start from a pretrained backbone: {images:,} photos are few for one of your own",
        "a classifier can only use what the features tell apart, and rare classes add nothing to features learned here. "
        "The weights are downloaded once; --weights also takes a file",
        "supplement C.3: on Places-LT (62,500 photos) the paper starts from ImageNet weights; the limit of "
        f"{PRETRAINED_BELOW:,} is our judgement",
        steps["pretrained"])  # fmt: skip
