"""Heads against their formulas, written out in plain Python, and against stage 1, which they start from."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from balms_cli.errors import CheckpointError
from balms_cli.models.classifiers import (
    CosineHead,
    LWSHead,
    cosine_head,
    linear_head,
    nearest_class_mean,
    stage1_linear,
    tau_normalised,
)


def test_a_fresh_linear_layer_is_uniform_within_one_over_the_root_of_its_features():
    head = linear_head(64, 500, torch.Generator().manual_seed(0))
    for parameter in (head.weight, head.bias):
        assert stats.kstest(8 * parameter.detach().flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert torch.equal(head.weight, linear_head(64, 500, torch.Generator().manual_seed(0)).weight)


@pytest.fixture
def stage1():
    head = linear_head(6, 4, torch.Generator().manual_seed(1)).double()
    head.weight.data *= torch.tensor([9.0, 3.0, 1.0, 0.2], dtype=torch.float64)[:, None]
    return head


def features(count=8, dtype=torch.float64):
    return torch.randn(count, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_a_cosine_head_is_the_scaled_cosine_of_every_pair():
    head, x_BD = cosine_head(6, 4, torch.Generator().manual_seed(0), scale=7.0).double(), features()
    logits = head(x_BD).tolist()
    for i, x in enumerate(x_BD.tolist()):
        for c, w in enumerate(head.weight.tolist()):
            assert logits[i][c] == pytest.approx(7 * dot(x, w) / math.sqrt(dot(x, x) * dot(w, w)), rel=1e-9)
    assert head(1000 * x_BD).tolist() == [pytest.approx(row) for row in logits]  # lengths say nothing
    assert not torch.equal(head.weight, cosine_head(6, 4, torch.Generator().manual_seed(1)).weight)


def test_a_feature_of_nothing_has_a_finite_cosine_and_gradient():
    head, x_BD = cosine_head(6, 4), torch.zeros(2, 6, requires_grad=True)
    head(x_BD).sum().backward()
    assert head(x_BD).abs().max() == 0 and x_BD.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_the_scale_of_a_cosine_head_is_part_of_the_checkpoint():
    head = CosineHead(6, 4)
    head.load_state_dict(cosine_head(6, 4, scale=11.0).state_dict())
    assert head.scale.item() == 11 and not head.scale.requires_grad


def test_lws_at_scale_one_is_stage_1_bit_for_bit_and_learns_its_scale_alone(stage1):
    head, x_BD = LWSHead(stage1), features()
    assert torch.equal(head(x_BD), stage1(x_BD)) and torch.equal(head.fold()(x_BD), stage1(x_BD))
    assert [name for name, _ in head.named_parameters()] == ["scale"]
    before = stage1.weight.clone()
    head.scale.data += 1
    assert torch.equal(stage1.weight, before)


def test_lws_scales_weight_and_bias_of_each_class_and_folds_into_a_linear_layer(stage1):
    head, x_BD = LWSHead(stage1), features()
    head.scale.data = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    want = [[f * (dot(x, w) + b) for f, w, b in zip([1, 2, 0.5, 4], stage1.weight.tolist(), stage1.bias.tolist(), strict=True)]
            for x in x_BD.tolist()]  # fmt: skip
    assert head(x_BD).tolist() == [pytest.approx(row, rel=1e-9) for row in want]
    torch.testing.assert_close(head.fold()(x_BD), head(x_BD), rtol=1e-12, atol=1e-12)
    assert type(head.fold()) is nn.Linear


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_divides_each_row_by_its_length_to_the_tau(stage1, tau):
    head = tau_normalised(stage1, tau)
    for w, made in zip(stage1.weight.tolist(), head.weight.tolist(), strict=True):
        assert made == pytest.approx([v / math.sqrt(dot(w, w)) ** tau for v in w], rel=1e-12)
    assert torch.equal(head.bias, stage1.bias)
    if tau == 0:
        assert torch.equal(head.weight, stage1.weight)
    if tau == 1:
        assert head.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 5.0])
def test_tau_norm_of_a_class_without_weights_is_without_weights(tau):
    head = linear_head(6, 2)
    head.weight.data[1] = 0
    made = tau_normalised(head, tau).weight
    assert made[0].isfinite().all() and not made[1].any()


def test_the_nearest_class_mean_by_a_double_loop():
    x_ND, labels = features(9), [0, 1, 2, 0, 1, 2, 0, 0, 1]
    head = nearest_class_mean(x_ND, torch.tensor(labels), 3)
    means = []
    for c in range(3):
        rows = [x for x, y in zip(x_ND.tolist(), labels, strict=True) if y == c]
        means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    for x, got in zip(x_ND.tolist(), head.double()(x_ND).argmax(1).tolist(), strict=True):
        cosines = [dot(x, m) / math.sqrt(dot(x, x) * dot(m, m)) for m in means]
        assert got == cosines.index(max(cosines))
    with pytest.raises(ValueError, match="no mean"):
        nearest_class_mean(x_ND, torch.tensor(labels), 4)


@pytest.mark.parametrize("head, kind", [(linear_head(6, 4), "untrained"), (cosine_head(6, 4), "cosine")])
def test_a_method_of_stage_1_weights_refuses_a_checkpoint_without_them(head, kind):
    with pytest.raises(CheckpointError, match="starts from the linear classifier of stage 1"):
        stage1_linear(head, kind, "lws")
