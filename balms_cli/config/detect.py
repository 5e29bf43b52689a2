"""The configurations of ``balms detect``: every value with its meaning, default and remembered source."""

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from .base import Beta, ComputeConfig, StageConfig

Family = Literal["softmax", "sigmoid"]
DetectLossName = Literal[
    "softmax", "balanced-softmax", "class-balanced", "ldam", "sigmoid", "balanced-sigmoid", "focal", "equalization",
]  # fmt: skip
DETECT_LOSSES = get_args(DetectLossName)
# The losses of binary problems: C scores and no background column. The others have C + 1 scores, background the first.
SIGMOID_LOSSES = ("sigmoid", "balanced-sigmoid", "focal", "equalization")


def family_of(loss: str) -> Family:
    """Which kind of box classifier a loss is one of."""
    return "sigmoid" if loss in SIGMOID_LOSSES else "softmax"


class DetectSGDConfig(ComputeConfig):
    """Optimisation: SGD with momentum under a linear warm-up and drops by ten, both pure functions of the step."""

    annotations: str | None = Field(None, description="LVIS-format (or COCO) JSON of the training images")
    images: str | None = Field(None, description="folder of the images (default: images/ beside the JSON, else its folder)")
    skip_bad: bool = Field(False, description="leave out missing and unreadable images, and count them")
    steps: int = Field(90_000, ge=1, description="optimizer steps")
    batch_size: int = Field(8, ge=1, description="images a step, over all processes")
    lr: float = Field(0.01, gt=0, description="peak learning rate")
    lr_drops: list[int] = Field([60_000, 80_000], description="steps from which the learning rate is a tenth of before")
    warmup_steps: int = Field(1000, ge=0, description="steps of linear warm-up from warmup_factor * lr to lr")
    warmup_factor: float = Field(0.001, ge=0, le=1, description="share of lr in the first warm-up step")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    nesterov: bool = Field(False, description="Nesterov momentum")
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty, on every trained parameter")
    repeat_threshold: float = Field(
        0.001, ge=0, lt=1, description="repeat factor sampling: share of the images under which a category repeats (0: off)"
    )
    flip: bool = Field(True, description="mirror every second image at random")
    min_sizes: list[int] = Field(
        [640, 672, 704, 736, 768, 800], min_length=1, description="scale jitter: shorter side in pixels, one drawn an image"
    )
    max_size: int = Field(1333, ge=32, le=4096, description="longest side that an image may get, in pixels")
    workers: int | None = Field(None, ge=0, le=256, description="decoder threads (default: one a processor, 8 at most)")
    checkpoint_seconds: float = Field(300.0, gt=0, description="seconds between writes of resume.pt")
    tensorboard: bool = Field(False, description="write TensorBoard event files beside metrics.jsonl (extra 'tensorboard')")
    deterministic: bool = Field(False, description="deterministic algorithms (always so on a CPU)")

    @model_validator(mode="after")
    def _check_schedule(self) -> "DetectSGDConfig":
        if sorted(set(self.lr_drops)) != self.lr_drops or (self.lr_drops and self.lr_drops[0] < 1):
            raise ValueError(f"lr_drops are steps in rising order, got {self.lr_drops}")
        if not all(32 <= size <= 4096 for size in self.min_sizes):
            raise ValueError(f"min_sizes are pixels from 32 to 4096, got {self.min_sizes}")
        return self


class DetectTrainConfig(DetectSGDConfig):
    """``balms detect train``: the whole detector."""

    loss: Family = Field("softmax", description="box classifier: softmax over categories and background, or sigmoids")
    backbone: str = Field("resnet50", description="resnet50, mobilenet_v3_large, any torchvision or timm:NAME network")
    weights: str | None = Field(
        None, description="initial weights of the backbone: imagenet (torchvision's), timm, pip:PACKAGE, or a file"
    )
    trainable_layers: int = Field(
        3, ge=0, le=5, description="stages of a pretrained backbone that are trained, from the last (0: none, 5: all)"
    )
    fpn_channels: int = Field(256, ge=16, le=1024, description="channels of the feature pyramid")
    head_features: int = Field(1024, ge=16, le=4096, description="features of the box head: what the classifier sees")
    masks: bool = Field(True, description="predict masks too (Mask R-CNN); false: boxes alone (Faster R-CNN)")
    class_agnostic: bool = Field(False, description="one box and one mask for all categories: less memory")
    test_size: int = Field(800, ge=32, le=4096, description="shorter side at test time, in pixels")
    proposals: int = Field(2000, ge=1, le=1_000_000, description="region proposals an image that survive, in training")
    rois_per_image: int = Field(512, ge=1, le=1_000_000, description="regions an image that the heads are trained on")
    foreground_share: float = Field(0.25, gt=0, le=1, description="share of them that may be foreground")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient (default: no clipping)")
    accumulate: int = Field(1, ge=1, description="parts that a process takes its share of a batch in: less memory")


class DetectFinetuneConfig(DetectSGDConfig):
    """``balms detect finetune``: the box classifier alone, ``cls_score``, from the weights that it has."""

    loss: DetectLossName = Field("balanced-softmax", description="loss of the box classifier")
    classifier: Literal["linear", "lws"] = Field("linear", description="what is tuned: the layer, or a scale a category (LWS)")
    steps: int = Field(22_000, ge=1, description="optimizer steps")
    lr: float = Field(0.02, gt=0, description="peak learning rate")
    lr_drops: list[int] = Field([11_000, 18_000], description="steps from which the learning rate is a tenth of before")
    sampler: Literal["repeat", "class"] = Field(
        "repeat", description="images of a step: by repeat factors, or class-balanced (by max 1/f_c of an image's categories)"
    )
    meta_reweigher: bool = Field(False, description="learn category weights by meta-learning (BALMS)")
    weight_norm: Literal["mean", "none"] = Field("mean", description="weights of mean 1 over the foreground, or raw")
    meta_lr: float = Field(0.001, gt=0, description="Adam's learning rate on the category weights")
    meta_betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="Adam's betas on the category weights")
    meta_batch_size: int = Field(8, ge=1, description="class-balanced images that the meta loss sees a step")
    meta_loss: Literal["plain", "adjusted"] = Field(
        "plain", description="what is read on the meta batch: the loss without the prior, or with it (the released code's slip)"
    )
    hypergradient: Literal["auto", "closed-form", "jvp", "higher"] = Field(
        "auto", description="how the bi-level step is computed (auto: closed-form for a linear layer, else jvp): same number"
    )
    cache: bool = Field(False, description="features of all images computed once and kept on disk; else anew every step")
    views: int = Field(2, ge=1, description="cache: augmented views of every image")
    focal_gamma: float = Field(2.0, ge=0, description="focal: terms are multiplied by (1 - p_t)^gamma")
    cb_beta: float = Field(0.999, ge=0, lt=1, description="class-balanced: beta of the effective number of images")
    ldam_margin: float = Field(0.5, ge=0, description="ldam: margin of the rarest category, in logits")
    eql_threshold: float = Field(
        0.00176, ge=0, le=1, description="equalization: share of the images under which a category is rare"
    )


class DetectEvaluateConfig(ComputeConfig):
    """``balms detect evaluate``: LVIS metrics of a run, or of a results file."""

    annotations: str | None = Field(None, description="JSON of the images to score on (default: that beside the training JSON)")
    images: str | None = Field(None, description="folder of the images (default: images/ beside the JSON, else its folder)")
    evaluator: Literal["hotcoco", "lvis"] = Field(
        "hotcoco", description="engine; lvis is the official one: same numbers, slower"
    )
    score_threshold: float = Field(1e-4, ge=0, lt=1, description="detections under this score are dropped")
    detections: int = Field(300, ge=1, le=10_000, description="detections an image at most")
    nms: float = Field(0.5, gt=0, le=1, description="overlap (IoU) above which the lesser of two boxes of a category goes")
    pre_nms: int = Field(10_000, ge=1, description="boxes an image, the best over all categories, that NMS sees")
    batch_size: int = Field(1, ge=1, description="images a forward pass")
    workers: int | None = Field(None, ge=0, le=256, description="decoder threads (default: one a processor, 8 at most)")
    require: list[str] = Field([], description="gates such as 'AP_r>=0.10', all to be met: else exit 6")

    @field_validator("require", mode="before")
    @classmethod
    def _one_gate_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DetectPredictConfig(ComputeConfig):
    """``balms detect predict``: pictures with boxes, masks and names, and a JSON line an image."""

    score_threshold: float = Field(0.3, ge=0, lt=1, description="detections under this score are not shown")
    detections: int = Field(100, ge=1, le=10_000, description="detections an image at most")
    nms: float = Field(0.5, gt=0, le=1, description="overlap (IoU) above which the lesser of two boxes of a category goes")
    pre_nms: int = Field(10_000, ge=1, description="boxes an image, the best over all categories, that NMS sees")


DETECT_STAGES: dict[str, type[StageConfig]] = {
    "detect-train": DetectTrainConfig, "detect-finetune": DetectFinetuneConfig,
    "detect-evaluate": DetectEvaluateConfig, "detect-predict": DetectPredictConfig,
}  # fmt: skip
