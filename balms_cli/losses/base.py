"""What every loss here is: a module built from class counts, called as ``loss(logits, targets)``, mean over the batch.

Shapes: B batch, C classes. ``per_example`` gives the B terms and ``denominator`` what their sum is divided by (B, or the
sum of class weights in the batch), so that a meta-learner can weigh the terms one by one. Counts act in training only: at
test time raw logits are used. Everything is computed at least in float32, whatever autocast made of the logits. Losses that
shift logits by class raise ValueError where these have another number of columns.

Regions of a detector: B are the regions, and ``background`` is the label of those that show none of the C classes (0 in
torchvision, C in detectron2 and mmdetection). Softmax then has C + 1 columns, a label being its column; sigmoids have C
columns, without one for the background, whose target is zero in each. Priors act on foreground rows alone, a background row
is left as it is (remark in A.2 of the supplement), and every loss is divided by the number of rows. The prior of a class is
its share of the images: several classes share an image, so these do not sum to one, as shares of counts do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_counts(labels_N: Tensor, num_classes: int | None = None) -> Tensor:
    """Training images a class: int64 [C] from integer labels [N].

    Raises ValueError for a class without images (its prior would be zero, its log minus infinity), for labels outside
    0..num_classes-1, and for what is no vector of integers.
    """
    labels_N = torch.as_tensor(labels_N)
    if labels_N.ndim != 1 or not len(labels_N) or labels_N.is_floating_point() or (labels_N := labels_N.long()).min() < 0:
        raise ValueError("labels must be a non-empty vector of integers >= 0")
    top = int(labels_N.max())
    if num_classes is not None and top >= num_classes:
        raise ValueError(f"label {top} is out of range 0..{num_classes - 1}")
    # Enough classes to name ten empty ones: a single wrong label must not decide how much memory is taken.
    limit = min(num_classes or top + 1, len(labels_N.unique()) + 10)
    return checked_counts(torch.bincount(labels_N[labels_N < limit], minlength=limit)).long()


def checked_counts(counts) -> Tensor:
    """Class counts as float64 [C]. Raises ValueError where one is not above zero and finite, and for none at all."""
    counts_C = torch.as_tensor(counts, dtype=torch.float64).flatten()
    if not len(counts_C) or not counts_C.isfinite().all():
        raise ValueError("class counts must be one finite number a class")
    empty = (counts_C <= 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"classes without training images: {empty[:10]}; remove them or merge them into others")
    return counts_C


def checked_priors(priors, background: int) -> Tensor:
    """Shares of the images as float64 [C]. Raises ValueError for one outside (0, 1), such as a count, and for a label of the
    background that is not 0..C."""
    priors_C = torch.as_tensor(priors, dtype=torch.float64).flatten()
    wrong_C = priors_C[~((priors_C > 0) & (priors_C < 1))]
    if len(wrong_C) or not len(priors_C):
        got = f"got {wrong_C[0]:g}" if len(wrong_C) else "got none"
        raise ValueError("with background= the first argument is each class's share of the N images, in (0, 1), not its count; "
                         f"{got}: give image counts / N, clamped to [1/(2N), 1 - 1/(2N)]")  # fmt: skip
    if background > len(priors_C):
        raise ValueError(f"background={background} is no label of {len(priors_C)} classes and background: it is one of "
                         f"0..{len(priors_C)}")  # fmt: skip
    return priors_C


def by_label(values_C: Tensor, background: int | None, of_background: float) -> Tensor:
    """Values of the classes in the order of the labels: [C], or [C + 1] with ``of_background`` in the background's place."""
    if background is None:
        return values_C
    return torch.cat([values_C[:background], values_C.new_full((1,), of_background), values_C[background:]])


def log_share(counts) -> Tensor:
    """log(n_c / N) in float64 [C]: shares, not counts, so that the shift stays small whatever the size of the data."""
    counts_C = checked_counts(counts)
    return (counts_C / counts_C.sum()).log()


def log_softmax(logits_BC: Tensor) -> Tensor:
    """log softmax over the classes [B, C]. torch's row kernel crawls where a row is shorter than a vector register; across
    rows it does not (B 512, C 10 on an AVX-512 CPU: 83 against 13 microseconds)."""
    if logits_BC.shape[1] < 24 and logits_BC.device.type == "cpu":
        return logits_BC.t().contiguous().log_softmax(0).t()
    return logits_BC.log_softmax(1)


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def minus_onehot(p_BC: Tensor, targets_B: Tensor) -> Tensor:
    """P - Y, in place."""
    return p_BC.scatter_add_(1, targets_B[:, None], p_BC.new_full((len(targets_B), 1), -1.0))


class SoftmaxLoss(nn.Module):
    """Cross-entropy on the logits as they are: the baseline of every table, and the base of the family.

    Most of the family is cross-entropy on changed logits, so a subclass says only how (``adjusted``); one with other terms
    overrides ``per_example`` too. ``class_counts`` is taken for the sake of one signature and not used here.

    ``background``: the label of background rows; the logits are then [B, C + 1]. Raises ValueError for one below zero.
    """

    # Is ``implied_log_prior`` what raw logits are calibrated for, or only the law that the loss was fed with?
    prior_is_exact = True
    # The bias that an untrained head starts from with this loss, as a number, and kept from weight decay; None: no matter.
    initial_bias: float | None = None

    def __init_subclass__(cls, **kwargs):
        """A subclass with other terms must bring their gradient too, or has none by hand: never its parent's."""
        super().__init_subclass__(**kwargs)
        if "per_example" in cls.__dict__ and "with_gradient" not in cls.__dict__:
            cls.with_gradient = None

    def __init__(self, class_counts=None, *, background: int | None = None):
        super().__init__()
        if background is not None:
            if background < 0:
                raise ValueError(f"background={background}: the label of background rows is 0 or more")
            self.prior_is_exact = False  # background rows are not adjusted
        self.background = background
        self.register_buffer("offset_C", None, persistent=False)

    def at_step(self, step: int, steps: int, seed: int = 0) -> None:
        """Told before every step of a run, for losses that change on the way or draw at random."""

    def plain(self) -> "SoftmaxLoss":
        """The loss of the same kind without prior, weights or margin: what a meta-learner reads on balanced batches."""
        return SoftmaxLoss(background=self.background)

    def adjusted(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """The logits that training sees, at least float32 [B, C]."""
        logits_BC = at_least_float32(logits_BC)
        if self.offset_C is None:
            return logits_BC
        offset_C = self.by_column(self.offset_C.to(logits_BC), logits_BC)
        if self.background is None:
            return logits_BC + offset_C
        return logits_BC + (targets_B != self.background)[:, None] * offset_C

    def by_column(self, values_C: Tensor, logits_BC: Tensor) -> Tensor:
        """Values of the classes in the order of the columns, zero for the background's. Raises ValueError where the logits have
        not as many columns."""
        values_C = self._columns(values_C)
        if len(values_C) != logits_BC.shape[1]:
            also = "" if self.background is None else ", and for a softmax one for the background"
            raise ValueError(f"{type(self).__name__} needs logits of {len(values_C)} columns here, got {logits_BC.shape[1]}: "
                             f"one a class{also}")  # fmt: skip
        return values_C

    def _columns(self, values_C: Tensor) -> Tensor:
        return by_label(values_C, self.background, 0.0)

    def per_example(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """The B terms of the loss: [B]."""
        return F.nll_loss(log_softmax(self.adjusted(logits_BC, targets_B)), targets_B, reduction="none")

    def with_gradient(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """The B terms, and the derivative of each by its logits [B, C]: P - Y (eqs 52 and 57 of the supplement). No graph."""
        log_p_BC = log_softmax(self.adjusted(logits_BC.detach(), targets_B))
        losses_B1 = -log_p_BC.gather(1, targets_B[:, None])
        return losses_B1.squeeze(1), minus_onehot(log_p_BC.exp_(), targets_B)

    def denominator(self, targets_B: Tensor) -> Tensor | int:
        """What the sum of the B terms is divided by."""
        return len(targets_B)

    def reduce(self, losses_B: Tensor, targets_B: Tensor) -> Tensor:
        """From terms to the scalar that is minimised, in their dtype: weights in float64 do not promote it."""
        return (losses_B.sum() / self.denominator(targets_B)).to(losses_B.dtype)

    def forward(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """The mean over the batch: a scalar."""
        return self.reduce(self.per_example(logits_BC, targets_B), targets_B)

    def implied_log_prior(self, log_law_C: Tensor) -> Tensor:
        """The class prior that raw logits assume after training on draws of law ``log_law_C`` (log, [C]): that law times
        exp(-offset). Softmax on the data: the data's; Balanced Softmax on the data: uniform, under CBS 1/n (A.5)."""
        offset_C = 0 if self.offset_C is None else self.offset_C.to(log_law_C)
        return (log_law_C - offset_C).log_softmax(0)
