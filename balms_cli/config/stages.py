"""The configurations of the commands on classification: every value with its meaning, default and remembered source."""

import math
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from .base import Beta, Compile, ComputeConfig, Estimator, Hypergradient, StageConfig, suggest

LossName = Literal[
    "softmax", "balanced", "balanced-sigmoid", "logit-adjusted", "focal", "cost-sensitive", "class-balanced",
    "class-balanced-sigmoid", "class-balanced-focal", "ldam", "equalization",
]  # fmt: skip
LOSSES = get_args(LossName)
CLASSIFIERS = ("auto", "linear", "cosine", "lws", "tau-norm", "ncm")
REWEIGHTERS = ("none", "l2rw", "meta-weight-net")
EXPORTS = ("onnx", "torch", "safetensors")
SAMPLERS = ("instance", "class", "square-root", "progressive")
MetaSet = Literal["train", "meta"]
Augmentation = Literal["resized-crop", "crop", "flip", "autoaugment", "cutout"]


class MakeLTConfig(StageConfig):
    """``balms make-lt``: from a source of images to a long-tailed manifest."""

    source: str = Field("digits", description="cifar10, cifar100, digits, a folder, a list or CSV file, or tar shards")
    imbalance: float | None = Field(None, ge=1, description="imbalance factor: largest class count / smallest")
    profile: Literal["exponential", "step", "pareto"] = Field(
        "exponential", description="shape of the tail (exponential: the paper's for CIFAR; pareto: as in ImageNet-LT)"
    )
    alpha: float = Field(6.0, gt=0, le=1000, description="pareto: its exponent (ImageNet-LT: 6)")
    as_is: bool = Field(False, description="keep every image: the data is long-tailed by nature")
    head_size: int | None = Field(None, ge=1, description="images of the largest class (default: all it has)")
    seed: int = Field(0, ge=0, description="which images of a class are kept")
    val_per_class: int = Field(0, ge=0, description="images a class cut for validation before the tail is made")
    meta_per_class: int = Field(0, ge=0, description="images a class cut for a meta set before the tail is made")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of a class used as test where the source has no test split"
    )
    skip_bad: bool = Field(False, description="leave out missing and unreadable images, and record them")
    check: bool = Field(True, description="decode every image of a folder or list once, to find unreadable ones now")
    data_root: str | None = Field(None, description="where known data sets lie on disk (else BALMS_DATA, else the cache)")
    offline: bool = Field(False, description="never download")
    images: str | None = Field(None, description="folder that a list's or CSV file's paths are relative to (default: its own)")
    names: str | None = Field(None, description="file of class names: synsets, Places365's or iNaturalist's categories, lines")
    leaf_classes: bool = Field(False, description="folders: each that holds images is a class (iNaturalist), not the outermost")


class RunConfig(ComputeConfig):
    """What every stage on images of one class each has in common."""

    loading: Literal["auto", "memory", "disk"] = Field(
        "auto", description="images in memory, or from their files as needed (auto: in memory where half of it holds them)"
    )
    workers: int | None = Field(None, ge=0, le=256, description="decoder threads (default: one a processor, 8 at most)")
    decode: Literal["cpu", "gpu"] = Field("cpu", description="loading from disk on a GPU: who decodes JPEG files (gpu: nvJPEG)")


class TrainConfig(RunConfig):
    """Optimisation: SGD with momentum under a linear warm-up and a cosine to zero, both pure functions of the step."""

    steps: int | None = Field(None, ge=1, description="optimizer steps (instead of epochs)")
    epochs: float | None = Field(None, gt=0, description="passes over the training images (instead of steps)")
    batch_size: int = Field(512, ge=1, description="images a step")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from warmup_lr to lr")
    warmup_lr: float = Field(0.0, ge=0, description="learning rate of the first warm-up step")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    nesterov: bool = Field(True, description="Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, on every trained parameter")
    sampler: str = Field("instance", description="instance, class, square-root, progressive, or a rates.json")
    loss: LossName = Field("softmax", description="training loss")
    loss_exponent: float = Field(
        1.0,
        ge=0,
        description="tau of balanced and logit-adjusted: logits + tau log n (1/4: Corollary 2.1); cost-sensitive: 1/n^tau",
    )
    focal_gamma: float = Field(1.0, ge=0, description="focal: terms are multiplied by (1 - p)^gamma")
    cb_beta: float = Field(0.9999, ge=0, lt=1, description="class-balanced and DRW: beta of the effective number of images")
    ldam_margin: float = Field(0.5, ge=0, description="ldam: margin of the rarest class, in cosine")
    cosine_scale: float = Field(30.0, gt=0, description="cosine classifier, so ldam too: logits are scale * cosine")
    eql_gamma: float = Field(0.9, ge=0, le=1, description="equalization: chance that a rare class is spared a push")
    eql_threshold: float = Field(0.005, ge=0, le=1, description="equalization: share of the images under which a class is rare")
    drw: bool = Field(False, description="deferred re-weighting: effective-number class weights late in training")
    drw_start: float = Field(0.8, ge=0, le=1, description="drw: share of the steps after which the weights act")
    checkpoint_seconds: float = Field(60.0, gt=0, description="seconds between writes of resume.pt")
    tensorboard: bool = Field(False, description="write TensorBoard event files beside metrics.jsonl (extra 'tensorboard')")
    deterministic: bool = Field(False, description="deterministic algorithms (always so on a CPU)")

    @property
    def head(self) -> str:
        """The kind of classifier that is meant: ``auto`` is cosine for ldam, whose margin is one of angles, else linear."""
        chosen = self.classifier
        return ("cosine" if self.loss == "ldam" else "linear") if chosen == "auto" else chosen

    def total_steps(self, images: int) -> int:
        """Steps of the run: as given, or from the epochs over so many training images."""
        return self.steps or max(1, math.ceil(self.epochs * images / self.batch_size))

    @model_validator(mode="after")
    def _check_exponent(self) -> "TrainConfig":
        if self.loss_exponent != 1 and self.loss not in ("balanced", "logit-adjusted", "cost-sensitive"):
            raise ValueError(f"loss_exponent is of balanced, logit-adjusted and cost-sensitive: --loss {self.loss} has none")
        return self

    @model_validator(mode="after")
    def _check_head(self) -> "TrainConfig":
        if self.loss == "ldam" and self.head != "cosine":
            raise ValueError(f"ldam is a margin between cosines: leave out --classifier {self.head}, or say cosine")
        return self

    @model_validator(mode="after")
    def _check_length_and_sampler(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.sampler not in SAMPLERS and not self.sampler.endswith(".json"):
            raise ValueError(f"sampler '{self.sampler}' is unknown; {suggest(self.sampler, SAMPLERS)} (or a rates.json)")
        return self


class PretrainConfig(TrainConfig):
    """``balms pretrain``: representation learning, stage 1."""

    steps: int | None = Field(2000, ge=1, description="optimizer steps (instead of epochs)")
    backbone: str = Field("resnet32", description="resnet8/20/32/44/56 (CIFAR), resnet10, torchvision's, or timm:NAME")
    weights: str | None = Field(
        None, description="initial weights: imagenet (torchvision's), timm, pip:PACKAGE (a file in it), or a file"
    )
    frozen: bool = Field(False, description="take the backbone as it is: nothing is trained in stage 1")
    image_size: int = Field(32, ge=8, le=1024, description="pixels a side fed to the network")
    augment: list[Augmentation] = Field(["crop", "flip", "cutout"], description="training augmentation, applied in this order")
    compile: Compile = Field("auto", description="torch.compile of the backbone (up to a minute of start-up): off, on, or "
                             "cuda-graphs (GPU); auto: on in long runs, of a billion pixels or more")  # fmt: skip
    sync_batch_norm: bool = Field(False, description="several GPUs: BatchNorm statistics over all of them")
    classifier: Literal["auto", "linear", "cosine"] = Field(
        "auto", description="head: linear or cosine (auto: cosine for ldam)"
    )
    reweight: Literal["none", "l2rw", "meta-weight-net"] = Field(
        "none", description="learn a weight for each example of a batch by looking one step ahead"
    )
    meta_batch_size: int = Field(100, ge=1, description="reweight: class-balanced images that the meta loss sees a step")
    meta_set: MetaSet = Field("train", description="reweight: meta images from the training set, or the held-out meta split")
    hypergradient: Literal["jvp", "higher"] = Field("jvp", description="reweight: how one looks ahead: same number, other cost")
    weight_net_hidden: int = Field(100, ge=1, description="meta-weight-net: hidden units of its V")
    weight_net_lr: float = Field(1e-5, gt=0, description="meta-weight-net: learning rate of V (SGD, Nesterov 0.9)")
    weight_net_decay: float = Field(5e-4, ge=0, description="meta-weight-net: weight decay of V")

    @model_validator(mode="after")
    def _check_reweight(self) -> "PretrainConfig":
        if self.reweight != "none" and self.frozen:
            raise ValueError("--frozen trains nothing in stage 1, so there is nothing to reweight")
        if self.reweight != "none" and self.compile not in ("auto", "off"):
            raise ValueError("--reweight differentiates through the plain network: leave out compile")
        return self


class RetrainConfig(TrainConfig):
    """``balms retrain``: decoupled classifier training on a fixed feature extractor, stage 2."""

    loss: LossName = Field("balanced", description="training loss")
    steps: int | None = Field(2000, ge=1, description="optimizer steps (instead of epochs)")
    meta_sampler: bool = Field(False, description="learn the class sample rates by meta-learning (BALMS)")
    meta_reweigher: bool = Field(False, description="learn class weights by meta-learning")
    meta_estimator: Estimator = Field("class", description="gradient estimator of the meta sampler")
    gumbel_temperature: float = Field(1.0, gt=0, description="temperature of the relaxed draw (eq 79)")
    weight_norm: Literal["mean", "none"] = Field("mean", description="meta reweigher: weights of mean 1 in a batch, or raw")
    hypergradient: Hypergradient = Field(
        "auto", description="how the bi-level step is computed (auto: closed-form for a linear head, else jvp): same number"
    )
    meta_lr: float = Field(0.01, gt=0, description="Adam's learning rate on the class rates")
    meta_betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="Adam's betas on the class rates")
    meta_batch_size: int = Field(512, ge=1, description="class-balanced images that the meta loss sees a step")
    meta_set: MetaSet = Field("train", description="where meta images come from: train, or the held-out meta split")
    classifier: Literal["auto", "linear", "cosine", "lws", "tau-norm", "ncm"] = Field(
        "auto", description="a fresh linear (cRT) or cosine layer, or one made from stage 1: lws, tau-norm, ncm"
    )
    tau_norm: float | None = Field(None, ge=0, le=5, description="tau-norm: the exponent (else chosen on the validation split)")
    features: Literal["bank", "online"] = Field("bank", description="bank: features computed once; online: anew every step")
    bank: Literal["auto", "memory", "disk"] = Field(
        "auto", description="feature bank in memory, or read from its file (auto: in memory where a quarter of it holds it)"
    )
    views: int = Field(4, ge=1, le=65_536, description="augmented views of every image in the feature bank")
    class_rows: int = Field(
        256, ge=0, le=1_000_000, description="rows in the bank that a class has at least: more views of rare images"
    )
    augment: bool = Field(True, description="augment the views as stage 1 did (false: one plain view an image)")

    @model_validator(mode="after")
    def _check_meta(self) -> "RetrainConfig":
        if self.meta_sampler and self.meta_reweigher:
            raise ValueError("--meta-sampler and --meta-reweigher exclude each other: one learns rates, the other weights")
        if self.meta_sampler and self.sampler != "instance":
            raise ValueError("--meta-sampler draws the batches itself: leave out --sampler")
        if self.classifier in ("tau-norm", "ncm") and (self.meta_sampler or self.meta_reweigher):
            raise ValueError(f"--classifier {self.classifier} trains nothing: a meta-learner has nothing to do in it")
        if self.hypergradient == "closed-form" and self.head != "linear":
            raise ValueError(
                f"the closed form is that of a linear layer: with --classifier {self.head} leave out --hypergradient"
            )
        if self.tau_norm is not None and self.classifier != "tau-norm":
            raise ValueError("--tau-norm is the exponent of --classifier tau-norm: add that, or leave it out")
        return self


class MetaSampleConfig(RetrainConfig):
    """``balms meta-sample``: the meta sampler alone; writes the class rates that it learned."""

    meta_sampler: Literal[True] = Field(True, description="always on here")


class EvaluateConfig(RunConfig):
    """``balms evaluate``: the test split, read here and nowhere else."""

    split: Literal["test", "val", "train"] = Field("test", description="which split is scored")
    batch_size: int = Field(512, ge=1, description="images a forward pass")
    require: list[str] = Field([], description="gates such as 'few>=0.30' or 'ece<=5%', all to be met: else exit 6")
    target_prior: str | None = Field(
        None, description="re-score for this class prior: uniform, train, reversed, or a JSON file of {class: share}"
    )
    posthoc_tau: float | None = Field(
        None, ge=0, le=10, description="post-hoc logit adjustment: this times (log target prior - log implied prior)"
    )
    bound: bool = Field(False, description="the terms of the generalisation bound (eqs 27-31), on plain training images")
    bound_beta: float = Field(1.0, gt=0, description="bound: what the margins of all classes add up to (eq 31), in nats")
    bound_delta: float = Field(0.05, gt=0, lt=1, description="bound: chance of failure, shared by the classes (eq 29)")

    @field_validator("require", mode="before")
    @classmethod
    def _one_gate_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PredictConfig(RunConfig):
    """``balms predict``: classes and scores of images without labels."""

    batch_size: int = Field(64, ge=1, le=65536, description="images a forward pass")
    top_k: int = Field(5, ge=1, description="classes named for an image, the likeliest first")
    calibrate: bool = Field(True, description="scale the scores by a temperature, where the run's data has a validation split")
    target_prior: str | None = Field(
        None, description="re-score for this class prior: uniform, train, reversed, or a JSON file of {class: share}"
    )
    posthoc_tau: float | None = Field(
        None, ge=0, le=10, description="post-hoc logit adjustment: this times (log target prior - log implied prior)"
    )
    decode: Literal["cpu"] = Field("cpu", description="who decodes JPEG files: here always the processor")


class ExportConfig(StageConfig):
    """``balms export``: the network in another format, on the CPU in float32."""

    to: Literal["onnx", "torch", "safetensors"] = Field("onnx", description="onnx, torch (torch.export) or safetensors")
    images: int = Field(64, ge=1, le=10_000, description="images that the exported model is checked on")
    tolerance: float = Field(
        1e-4, gt=0, le=1, description="largest difference let pass: of logits relative to the image's largest over 1"
    )
    target_prior: str | None = Field(
        None, description="bake in this class prior: uniform, train, reversed, or a JSON file of {class: share}"
    )
    posthoc_tau: float | None = Field(
        None, ge=0, le=10, description="post-hoc logit adjustment: this times (log target prior - log implied prior)"
    )
    workers: int | None = Field(None, ge=0, le=256, description="decoder threads (default: one a processor, 8 at most)")


class AuditConfig(StageConfig):
    """``balms audit``: a data set looked at before anything is made of it."""

    data: str | None = Field(
        None, description="cifar10, cifar100, digits, a folder, a list file, or a manifest (default: the newest manifest)"
    )
    decode: bool = Field(True, description="read every image in full; else files are listed and their status looked at")
    hashes: bool | None = Field(None, description="look for files with the same content (default: where images are decoded)")
    workers: int | None = Field(None, ge=0, le=256, description="threads (default: one a processor, 8 at most)")
    data_root: str | None = Field(None, description="where known data sets lie on disk (else BALMS_DATA, else the cache)")
    offline: bool = Field(False, description="never download")
    images: str | None = Field(None, description="folder that a list's or CSV file's paths are relative to (default: its own)")
    names: str | None = Field(None, description="file of class names: synsets, Places365's or iNaturalist's categories, lines")
    leaf_classes: bool = Field(False, description="folders: each that holds images is a class (iNaturalist), not the outermost")


CLASSIFY_STAGES: dict[str, type[StageConfig]] = {
    "make-lt": MakeLTConfig, "audit": AuditConfig, "pretrain": PretrainConfig, "retrain": RetrainConfig,
    "meta-sample": MetaSampleConfig, "evaluate": EvaluateConfig, "predict": PredictConfig, "export": ExportConfig,
}  # fmt: skip
