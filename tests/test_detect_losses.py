"""``region_loss`` by name, against torchvision's own losses and hand-made weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from balms_cli.config.detect import DETECT_LOSSES, DetectFinetuneConfig, family_of
from balms_cli.detection.losses import region_loss
from balms_cli.losses import BalancedSigmoidLoss, BalancedSoftmaxLoss, SigmoidLoss, SoftmaxLoss

COUNTS = [400, 90, 12, 1]
SHARES = [n / 500 for n in COUNTS]
C, R = 4, 13


def regions(name):
    generator = torch.Generator().manual_seed(3)
    columns = C + (family_of(name) == "softmax")
    return 2 * torch.randn(R, columns, dtype=torch.float64, generator=generator), torch.arange(R) % (C + 1)


def onehot(labels):
    return F.one_hot(labels, C + 1)[:, 1:].double()


def value(name, **options):
    return region_loss(name, SHARES, COUNTS, **options)(*regions(name)).item()


def test_softmax_is_torchvisions():
    from torchvision.models.detection.roi_heads import fastrcnn_loss

    logits, labels = regions("softmax")
    want, _ = fastrcnn_loss(logits, torch.zeros(R, 4 * (C + 1)).double(), [labels], [torch.zeros(R, 4).double()])
    assert value("softmax") == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_is_torchvisions_without_alpha_over_the_regions(gamma):
    from torchvision.ops import sigmoid_focal_loss

    logits, labels = regions("focal")
    want = sigmoid_focal_loss(logits, onehot(labels), alpha=-1, gamma=gamma, reduction="sum") / R
    assert value("focal", gamma=gamma) == pytest.approx(want.item(), rel=1e-11)


def test_sigmoid_is_torchs():
    logits, labels = regions("sigmoid")
    want = F.binary_cross_entropy_with_logits(logits, onehot(labels), reduction="sum") / R
    assert value("sigmoid") == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("name, public", [("balanced-softmax", BalancedSoftmaxLoss), ("balanced-sigmoid", BalancedSigmoidLoss)])
def test_balanced_losses_are_the_public_ones(name, public):
    assert value(name) == public(SHARES, background=0)(*regions(name)).item()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_class_balanced_weighs_foreground_by_effective_numbers_of_mean_one_over_the_images(beta):
    effective = [sum(beta**i for i in range(n)) for n in COUNTS]  # the geometric series itself
    raw = [1 / e for e in effective]
    scale = sum(COUNTS) / sum(n * w for n, w in zip(COUNTS, raw, strict=True))
    weights = torch.tensor([1.0, *(scale * w for w in raw)], dtype=torch.float64)
    logits, labels = regions("class-balanced")
    want = (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).sum() / R
    assert value("class-balanced", beta=beta) == pytest.approx(want.item(), rel=1e-11)


def test_ldam_takes_its_margin_off_the_true_foreground_logit_alone():
    logits, labels = regions("ldam")
    margins = torch.tensor([0.0, *(0.7 * (n / COUNTS[-1]) ** -0.25 for n in COUNTS)], dtype=torch.float64)
    want = F.cross_entropy(logits - F.one_hot(labels, C + 1) * margins, labels)
    assert value("ldam", margin=0.7) == pytest.approx(want.item(), rel=1e-11)
    assert value("ldam", margin=0.0) == pytest.approx(value("softmax"), rel=1e-12)


def test_equalization_spares_rare_categories_in_foreground_rows():
    logits, labels = regions("equalization")
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for j, z in enumerate(row, 1):
            if label and j != label and SHARES[j - 1] < 0.02:  # only the last: 1/500; 12/500 is not
                continue
            total += math.log1p(math.exp(-z if j == label else z))
    assert value("equalization", eql_threshold=0.02) == pytest.approx(total / R, rel=1e-11)
    assert value("equalization", eql_threshold=0.02) < value("sigmoid")
    assert value("equalization", eql_threshold=SHARES[-1]) == pytest.approx(value("sigmoid"), rel=1e-12)  # strictly below


@pytest.mark.parametrize("name", DETECT_LOSSES)
def test_every_name_is_built_in_float32_with_the_plain_loss_of_its_family(name):
    config = DetectFinetuneConfig()
    options = {"gamma": config.focal_gamma, "beta": config.cb_beta, "margin": config.ldam_margin}
    loss = region_loss(name, SHARES, COUNTS, eql_threshold=config.eql_threshold, **options)
    assert value(name) == loss(*regions(name)).item()  # the defaults are the configuration's
    logits, labels = regions(name)
    got = loss.float()(logits.float(), labels)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(value(name), rel=1e-5)
    assert loss.background == 0 and loss.with_gradient is not None
    plain = loss.plain()
    assert type(plain) is {"softmax": SoftmaxLoss, "sigmoid": SigmoidLoss}[family_of(name)] and plain.background == 0
    assert plain(logits, labels).item() == value(family_of(name))


def test_refusals():
    with pytest.raises(KeyError):
        region_loss("balanced", SHARES, COUNTS)
    with pytest.raises(ValueError, match="share of the N images"):
        region_loss("balanced-sigmoid", COUNTS, COUNTS)
    with pytest.raises(ValueError, match="beta"):
        region_loss("class-balanced", SHARES, COUNTS, beta=1.0)
    with pytest.raises(ValueError, match="without training images"):
        region_loss("class-balanced", SHARES, [3, 0, 1, 1])
