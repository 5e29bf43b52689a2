"""The Meta Reweigher on regions: one process against ``higher`` and finite differences, several against one.

The bi-level map is written out: theta -> weights of the regions -> a step of torch.optim.SGD on a copy -> meta loss.
"""

import copy
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from balms_cli import BalancedSigmoidLoss, BalancedSoftmaxLoss, MetaReweigher, SoftmaxLoss, influence
from balms_cli.config.detect import DETECT_LOSSES, family_of
from balms_cli.detection.losses import region_loss
from balms_cli.detection.reweigh import region_weights, theta_gradient
from balms_cli.engine.distributed import World
from balms_cli.losses import CostSensitiveLoss, FocalLoss, SigmoidLoss

C, D, R, M = 4, 6, 14, 11
COUNTS = [60, 20, 5, 1]
SHARES = [n / 80 for n in COUNTS]
THETA = [0.4, -0.8, 0.1, 1.5]
SGD = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-3},
    "nesterov": {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": True},
}


def problem(name="balanced-sigmoid", settings="momentum", seed=0):
    """A head with momentum in its buffers, the loss, the regions of a batch and of a meta batch; category 3 is not drawn."""
    generator = torch.Generator().manual_seed(seed)
    loss = region_loss(name, SHARES, COUNTS)
    head = nn.Linear(D, C + (family_of(name) == "softmax")).double()
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.SGD(head.parameters(), **SGD[settings])
    x, meta, earlier = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (R, M, 5))
    if settings != "plain":
        loss(head(earlier), torch.arange(5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 0, 4, 0, 1, 2, 0, 4, 1])
    return head, optimizer, loss, (x, labels), (meta, torch.arange(M) % (C + 1))


def reweigher(norm="mean", theta=THETA):
    learner = MetaReweigher(C, norm=norm).double()
    with torch.no_grad():
        learner.theta.copy_(torch.tensor(theta, dtype=torch.float64))
    return learner


def weights_with_graph(theta_C, labels_R, norm):
    rates_C = theta_C.sigmoid()
    foreground = [i for i, y in enumerate(labels_R.tolist()) if y]
    weights_R = torch.ones(len(labels_R), dtype=torch.float64)
    rates = torch.stack([rates_C[labels_R[i] - 1] for i in foreground])
    if norm == "mean":
        rates = rates * (len(foreground) / rates.sum())
    return weights_R.index_put((torch.tensor(foreground),), rates)


def meta_loss_after_the_step(theta_C, head, optimizer, loss, batch, meta_batch, norm, meta_loss):
    """The bi-level map in float64; by deep copies and torch's own optimizer."""
    head, optimizer = copy.deepcopy((head, optimizer))
    weights_R = weights_with_graph(theta_C, batch[1], norm)
    optimizer.zero_grad()
    ((weights_R * loss.per_example(head(batch[0]), batch[1])).sum() / len(batch[1])).backward()
    optimizer.step()
    return meta_loss(head(meta_batch[0]), meta_batch[1]).item()


def by_finite_differences(theta, *rest, step=1e-4):
    slopes = []
    for nudge_C in step * torch.eye(C, dtype=torch.float64):
        up, down = (meta_loss_after_the_step(torch.tensor(theta, dtype=torch.float64) + s * nudge_C, *rest) for s in (1, -1))
        slopes.append((up - down) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64)


def by_higher(theta, head, optimizer, loss, batch, meta_batch, norm, meta_loss):
    """``higher`` through the step and the weights, down to theta: nothing of ``influence`` is used."""
    theta_C = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher

        with higher.innerloop_ctx(head, optimizer, copy_initial_weights=False) as (fhead, diffopt):
            losses_R = loss.per_example(fhead(batch[0]), batch[1])
            diffopt.step((weights_with_graph(theta_C, batch[1], norm) * losses_R).sum() / len(batch[1]))
            return torch.autograd.grad(meta_loss(fhead(meta_batch[0]), meta_batch[1]), theta_C)[0]


def gradient_by_influence(learner, head, optimizer, loss, batch, meta_batch, meta_loss, method="closed-form", **world):
    weights_R = region_weights(learner, batch[1], **world)
    total = world["world"].sum if world else None
    seen = influence(head, optimizer, loss, batch, meta_batch, weights_B=weights_R, meta_loss=meta_loss, method=method,
                     total=total)  # fmt: skip
    return theta_gradient(learner, batch[1], seen.influence_B, **world), seen


@pytest.mark.parametrize("settings", SGD)
@pytest.mark.parametrize("name", DETECT_LOSSES)
def test_the_reweighers_gradient_equals_higher_and_finite_differences(name, settings):
    head, optimizer, loss, batch, meta_batch = problem(name, settings)
    for norm in ("mean", "none"):
        for meta_loss in (loss.plain(), loss):
            rest = head, optimizer, loss, batch, meta_batch
            for method in ("closed-form", "jvp", "higher"):
                got_C, _ = gradient_by_influence(reweigher(norm), *rest, meta_loss, method)
                want_C = by_higher(THETA, *rest, norm, meta_loss)
                torch.testing.assert_close(got_C, want_C, rtol=1e-9, atol=1e-9 * want_C.abs().max().item())
            differences_C = by_finite_differences(THETA, *rest, norm, meta_loss)
            torch.testing.assert_close(got_C, differences_C, rtol=1e-5, atol=1e-5 * want_C.abs().max().item())
            assert got_C.abs().max() > 1e-4 and got_C[2] == 0  # the third category is not in the batch


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_weights_by_hand(norm):
    labels_R, learner = problem()[3][1], reweigher(norm)
    got_R = region_weights(learner, labels_R)
    want_R = weights_with_graph(learner.theta.detach(), labels_R, norm)
    torch.testing.assert_close(got_R, want_R, rtol=1e-14, atol=0)
    assert (got_R[labels_R == 0] == 1).all()
    foreground_R = labels_R > 0
    torch.testing.assert_close(got_R[foreground_R], learner.weights(labels_R[foreground_R] - 1), rtol=1e-14, atol=0)


def test_at_the_start_every_region_weighs_one():
    assert region_weights(MetaReweigher(C), torch.tensor([0, 1, 4, 2])).tolist() == [1.0] * 4
    assert region_weights(MetaReweigher(C, norm="none"), torch.tensor([0, 1, 4, 2])).tolist() == [1.0, 0.5, 0.5, 0.5]


def test_without_foreground_there_is_no_gradient_and_background_weighs_one():
    labels_R = torch.zeros(3, dtype=torch.int64)
    for norm in ("mean", "none"):
        learner = reweigher(norm)
        assert region_weights(learner, labels_R).tolist() == [1.0] * 3
        assert theta_gradient(learner, labels_R, torch.randn(3)) is None


# Several processes


class Thread:
    """A World for threads of one process: what one says, all hear."""

    def __init__(self, rank, size, said, barrier):
        self.rank, self.size, self._said, self._barrier = rank, size, said, barrier

    def _exchange(self, value):
        self._said[self.rank] = value
        self._barrier.wait()
        heard = list(self._said)
        self._barrier.wait()
        return heard

    def sum(self, value):
        return torch.stack(self._exchange(value)).sum(0)

    def gather_rows(self, part):
        return torch.cat(self._exchange(part))


def in_threads(shares, function):
    """``function(share, world)`` for each share at once, one thread each; what they return, in order."""
    said, barrier, results = [None] * len(shares), threading.Barrier(len(shares), timeout=30), [None] * len(shares)

    def work(rank):
        try:
            results[rank] = function(shares[rank], Thread(rank, len(shares), said, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def cut(batch, *places):
    return [tuple(t[a:b] for t in batch) for a, b in zip((0, *places), (*places, len(batch[1])), strict=True)]


SHARES_OF = [((5,), (7,)), ((4,), (0,)), ((3, 4), (5, 6))]  # where a batch of 14 and a meta batch of 11 are cut


@pytest.mark.parametrize("name", ["balanced-softmax", "balanced-sigmoid", "class-balanced", "focal"])
@pytest.mark.parametrize("places, meta_places", SHARES_OF)
def test_processes_with_unlike_shares_find_what_one_finds_with_all_rows(name, places, meta_places):
    """A process without foreground (the row between 3 and 4) and one without meta rows (cut at 0) are among them."""
    for norm in ("mean", "none"):
        head, optimizer, loss, batch, meta_batch = problem(name, "nesterov")
        meta_loss = loss.plain()
        want_C, want = gradient_by_influence(reweigher(norm), head, optimizer, loss, batch, meta_batch, meta_loss)
        shares = list(zip(cut(batch, *places), cut(meta_batch, *meta_places), strict=True))

        def one(share, world, norm=norm, given=(head, optimizer, loss), meta_loss=meta_loss):
            return gradient_by_influence(reweigher(norm), *given, *share, meta_loss, world=world)

        found = in_threads(shares, one)
        for got_C, got in found:
            torch.testing.assert_close(got_C, want_C, rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(got.grads, want.grads, rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(got.meta_loss, want.meta_loss, rtol=1e-12, atol=0)
            assert torch.equal(got_C, found[0][0])  # bit for bit: all take the same step
        for field in ("influence_B", "losses_B"):
            rows = torch.cat([getattr(got, field) for _, got in found])
            torch.testing.assert_close(rows, getattr(want, field), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("meta_loss", [None, CostSensitiveLoss([9, 3, 1]), FocalLoss(), BalancedSoftmaxLoss([5, 2, 1])])
@pytest.mark.parametrize("loss", [SoftmaxLoss(), CostSensitiveLoss([50, 9, 1])], ids=["rows", "weights"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_denominator_of_its_own_is_summed_too(loss, meta_loss, bias):
    """Losses of images whose terms are divided by the weights of the batch; by default the meta loss is cross-entropy."""
    torch.manual_seed(4)
    head = nn.Linear(D, 3, bias=bias).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    batch, meta_batch = ((torch.randn(n, D).double(), torch.randint(0, 3, (n,))) for n in (9, 7))
    options = {"weights_B": None} if meta_loss is None else {"weights_B": None, "meta_loss": meta_loss}
    want = influence(head, optimizer, loss, batch, meta_batch, method="jvp", **options)
    one = influence(head, optimizer, loss, batch, meta_batch, **options)
    shares = list(zip(cut(batch, 2), cut(meta_batch, 5), strict=True))
    found = in_threads(shares, lambda share, w: influence(head, optimizer, loss, *share, total=w.sum, **options))
    for influence_B in (one.influence_B, torch.cat([got.influence_B for got in found])):
        torch.testing.assert_close(influence_B, want.influence_B, rtol=1e-9, atol=1e-14)
    for got in (one, *found):
        torch.testing.assert_close(got.meta_loss, want.meta_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.grads, want.grads, rtol=1e-10, atol=1e-14)


def test_a_total_of_one_process_changes_nothing():
    head, optimizer, loss, batch, meta_batch = problem()
    alone = influence(head, optimizer, loss, batch, meta_batch, meta_loss=loss.plain(), weights_B=2.0)
    summed = influence(head, optimizer, loss, batch, meta_batch, meta_loss=loss.plain(), weights_B=2.0, total=World().sum)
    torch.testing.assert_close(summed, alone, rtol=1e-12, atol=1e-15)


def test_what_total_does_not_do_is_refused():
    head, optimizer, loss, batch, meta_batch = problem()
    plain = {"meta_loss": loss.plain(), "total": World().sum}
    for method in ("jvp", "higher"):
        with pytest.raises(ValueError, match=f"closed form, for an nn.Linear, not by {method}"):
            influence(head, optimizer, loss, batch, meta_batch, method=method, **plain)
    deep = nn.Sequential(nn.Linear(D, C)).double()
    with pytest.raises(ValueError, match="not by jvp"):
        influence(deep, torch.optim.SGD(deep.parameters(), lr=0.1), loss, batch, meta_batch, **plain)
    with pytest.raises(ValueError, match="weights as a tensor"):
        influence(head, optimizer, loss, batch, meta_batch, weights_B=lambda losses_B: losses_B, **plain)
    with pytest.raises(ValueError, match="per_example and denominator"):
        influence(head, optimizer, loss, batch, meta_batch, meta_loss=lambda z, y: z.sum(), total=World().sum)


def test_alone_sums_and_rows_are_what_they_were():
    value = torch.tensor([1.0, 2.0])
    assert World().sum(value) is value and World().gather_rows(value) is value


GLOO = """
import sys, torch
from balms_cli.engine.distributed import join
from tests.test_region_influence import cut, gradient_by_influence, problem, reweigher

with join("cpu") as world:
    r, n = world.rank, world.size
    whole = world.sum(torch.tensor([r + 1.0]))
    counted = world.sum(torch.tensor(3 + r))
    leaf = torch.ones(2, requires_grad=True)
    assert not world.sum(leaf * 2).requires_grad and leaf.tolist() == [1, 1]
    kept = torch.full((2,), float(r)); world.sum(kept); assert kept.tolist() == [r, r]  # what is summed stays
    rows = world.gather_rows(torch.full((2 * r, 3), r, dtype=torch.int64))  # none of process 0
    head, optimizer, loss, batch, meta_batch = problem("balanced-sigmoid", "nesterov")
    share = cut(batch, 4)[r], cut(meta_batch, 7)[r]
    got_C, got = gradient_by_influence(reweigher(), head, optimizer, loss, *share, loss.plain(), world=world)
    torch.save([whole, counted, rows, got_C, got], f"{sys.argv[1]}/{r}.pt")
"""


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    torch_run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "script.py").write_text(GLOO)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    done = subprocess.run([*torch_run, str(tmp_path / "script.py"), str(tmp_path)], env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, optimizer, loss, batch, meta_batch = problem("balanced-sigmoid", "nesterov")
    want_C, want = gradient_by_influence(reweigher(), head, optimizer, loss, batch, meta_batch, loss.plain())
    differences_C = by_finite_differences(THETA, head, optimizer, loss, batch, meta_batch, "mean", loss.plain())
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1)]
    for whole, counted, rows, got_C, got in found:
        assert whole.tolist() == [3.0] and counted.item() == 7 and rows.tolist() == [[1] * 3] * 2
        torch.testing.assert_close(got_C, want_C, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(got_C, differences_C, rtol=1e-5, atol=1e-5 * want_C.abs().max().item())
        torch.testing.assert_close(got.grads, want.grads, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(got.meta_loss, want.meta_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([f[4].influence_B for f in found]), want.influence_B, rtol=1e-10, atol=1e-13)


def test_the_public_losses_are_those_of_the_map():
    """``problem`` goes by name; someone's own head takes the public ones, with the background where their framework has it."""
    head, optimizer, _, (x, labels), (meta, meta_labels) = problem("balanced-sigmoid")
    want_C, _ = gradient_by_influence(reweigher(), *problem("balanced-sigmoid"), SigmoidLoss(background=0))
    last = (labels - 1) % (C + 1), (meta_labels - 1) % (C + 1)  # 0..C-1, background C
    loss = BalancedSigmoidLoss(SHARES, background=C)
    seen = influence(head, optimizer, loss, (x, last[0]), (meta, last[1]), meta_loss=loss.plain(),
                     weights_B=region_weights(reweigher(), labels))  # fmt: skip
    torch.testing.assert_close(theta_gradient(reweigher(), labels, seen.influence_B), want_C, rtol=1e-12, atol=0)
