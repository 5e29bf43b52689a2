"""Class counts by hand and by the field's totals, shot groups, draws."""

import numpy as np
import pytest

from balms_cli.data import longtail

CIFAR10_IF200 = [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]


@pytest.mark.parametrize(
    ("n_max", "k", "imbalance", "total"),
    [(5000, 10, 200, 11203), (5000, 10, 100, 12406), (5000, 10, 50, 13996), (5000, 10, 10, 20431),
     (500, 100, 200, 9502), (500, 100, 100, 10847), (500, 100, 50, 12608), (500, 100, 10, 19573)],
)  # fmt: skip
def test_totals_of_the_field(n_max: int, k: int, imbalance: int, total: int) -> None:
    assert longtail.class_counts_exponential(n_max, k, imbalance).sum() == total


def test_cifar10_counts() -> None:
    counts = longtail.class_counts_exponential(5000, 10, 200)
    assert counts.tolist() == CIFAR10_IF200
    assert counts.dtype == np.int64


def test_exponential_equals_exact_integers() -> None:
    # m is the count where m^(k-1) * IF^c <= n^(k-1) < (m+1)^(k-1) * IF^c: no floating point in it.
    cases = [(5000, 10, 200), (1280, 7, 256), (500, 100, 100), (4096, 5, 16), (1000, 4, 1000), (243, 6, 243)]
    for n, k, factor in cases:
        for c, m in enumerate(longtail.class_counts_exponential(n, k, factor).tolist()):
            assert m ** (k - 1) * factor**c <= n ** (k - 1) < (m + 1) ** (k - 1) * factor**c, (n, k, factor, c)


@pytest.mark.parametrize(
    ("n_max", "imbalance", "tail"), [(500, 200, 2), (5000, 200, 25), (5000, 100, 50), (500, 100, 5), (7, 7, 1)]
)
def test_ends_are_exact(n_max: int, imbalance: float, tail: int) -> None:
    for k in range(2, 120):
        counts = longtail.class_counts_exponential(n_max, k, imbalance)
        assert (counts[0], counts[-1]) == (n_max, tail)
        assert (np.diff(counts) <= 0).all()


def test_never_below_one_and_one_class() -> None:
    assert longtail.class_counts_exponential(10, 5, 1e6).min() == 1
    assert longtail.class_counts_step(10, 4, 1e6).tolist() == [10, 10, 1, 1]
    assert longtail.class_counts_exponential(7, 1, 50).tolist() == [7]
    assert longtail.class_counts_step(7, 1, 50).tolist() == [7]
    assert longtail.class_counts_exponential(9, 4, 1).tolist() == [9] * 4


def test_step_profile() -> None:
    assert longtail.class_counts_step(5000, 10, 100).tolist() == [5000] * 5 + [50] * 5
    assert longtail.class_counts_step(90, 5, 10).tolist() == [90] * 3 + [9] * 2


# ---- the Pareto tail: ImageNet-LT has 115,846 images in 1,000 classes, Places-LT 62,500 in 365 (field notes; OLTR)


def random_draws(n_max: int, k: int, imbalance: float, alpha: float, draws: int) -> np.ndarray:
    """Totals of what the profile is the middle of: values drawn by chance (numpy's Pareto), sorted, stretched to the ends."""
    values = np.sort(np.random.default_rng(0).pareto(alpha, (draws, k)), axis=1)[:, ::-1]
    share = (values - values[:, -1:]) / (values[:, :1] - values[:, -1:])
    return np.floor(n_max / imbalance + share * (n_max - n_max / imbalance)).sum(axis=1)


def test_pareto_by_hand() -> None:
    ranks = [(c + 0.7) / 4.4 for c in range(4)]
    values = [u ** (-1 / 2) for u in ranks]
    expected = [10 + (v - values[3]) / (values[0] - values[3]) * 90 for v in values]
    assert longtail.class_counts_pareto(100, 4, 10, alpha=2).tolist() == [int(x + 1e-9) for x in expected] == [100, 42, 21, 10]


@pytest.mark.parametrize(("published", "alpha", "off"), [("ImageNet-LT", 6, -0.0312), ("Places-LT", 6, 2.1567),
                                                         ("Places-LT", 1.34, -0.3397)])  # fmt: skip
def test_how_near_the_draw_comes_to_the_published_lists(published: str, alpha: float, off: float) -> None:
    one = next(p for p in longtail.PUBLISHED if p.name == published)
    factor = one.largest / one.smallest
    counts = longtail.class_counts_pareto(one.largest, one.classes, factor, alpha)
    assert (counts[0], counts[-1]) == (one.largest, one.smallest) and (np.diff(counts) <= 0).all()
    assert counts.sum() / one.images - 1 == pytest.approx(off, abs=1e-3)
    totals = random_draws(one.largest, one.classes, factor, alpha, 1000)
    assert counts.sum() == pytest.approx(np.median(totals), rel=0.05)
    assert (np.quantile(totals, 0.025) < one.images < np.quantile(totals, 0.975)) == (off < 1)  # 6 is not Places-LT's alpha


@pytest.mark.parametrize(("published", "alpha"), [("ImageNet-LT", 6.401), ("Places-LT", 1.693)])
def test_the_alpha_that_comes_nearest(published: str, alpha: float) -> None:
    one = next(p for p in longtail.PUBLISHED if p.name == published)
    factor = one.largest / one.smallest
    assert longtail.alpha_for_total(one.images, one.largest, one.classes, factor) == alpha
    total = longtail.class_counts_pareto(one.largest, one.classes, factor, alpha).sum()
    assert total == pytest.approx(one.images, rel=1e-3)
    assert longtail.alpha_for_total(10, one.largest, one.classes, factor) is None


@pytest.mark.parametrize("alpha", [0.01, 0.5, 6, 1000])
def test_pareto_ends_are_exact(alpha: float) -> None:
    for k in (1, 2, 3, 100):
        counts = longtail.class_counts_pareto(500, k, 100, alpha)
        assert counts[0] == 500 and (k == 1 or counts[-1] == 5) and (np.diff(counts) <= 0).all()
    assert longtail.class_counts_pareto(10, 5, 1e6, alpha).min() == 1


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_pareto_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="finite alpha"):
        longtail.class_counts_pareto(10, 5, 2, alpha)


@pytest.mark.parametrize("bad", [(0, 5, 10), (10, 0, 10), (10, 5, 0.5), (10, 5, float("nan")), (10, 5, float("inf"))])
def test_out_of_range(bad: tuple[int, int, float]) -> None:
    for profile in longtail.PROFILES.values():
        with pytest.raises(ValueError, match="need n_max"):
            profile(*bad)


def test_groups_at_their_limits() -> None:
    assert longtail.shot_groups([101, 100, 20, 19, 1]).tolist() == ["many", "medium", "medium", "few", "few"]
    groups = longtail.shot_groups(longtail.class_counts_exponential(500, 100, 200)).tolist()
    assert [groups.count(g) for g in longtail.GROUPS] == [30, 31, 39]


def test_imbalance_factor_and_gini() -> None:
    assert longtail.imbalance_factor(CIFAR10_IF200) == 200
    with pytest.raises(ValueError, match="at least one image"):
        longtail.imbalance_factor([3, 0])
    assert longtail.gini([4, 4, 4]) == 0
    assert longtail.gini([0, 0, 0, 8]) == pytest.approx(3 / 4)
    counts = np.array([1, 5, 2])  # the definition: mean absolute difference over twice the mean
    assert longtail.gini(counts) == pytest.approx(np.abs(counts[:, None] - counts).mean() / (2 * counts.mean()))


def test_order_depends_on_seed_class_and_key_alone() -> None:
    keys = [f"a/{i}.png" for i in range(50)]
    order = [keys[i] for i in longtail.order_images(0, "a", keys)]
    assert sorted(order) == sorted(keys)
    assert [keys[::-1][i] for i in longtail.order_images(0, "a", keys[::-1])] == order  # not on the order on disk
    fewer = keys[::2]  # nor on the other images
    assert [fewer[i] for i in longtail.order_images(0, "a", fewer)] == [key for key in order if key in fewer]
    assert order != [keys[i] for i in longtail.order_images(1, "a", keys)]
    assert order != [keys[i] for i in longtail.order_images(0, "b", keys)]


def test_order_is_the_same_on_every_machine() -> None:
    import hashlib  # the rule written out by hand

    keys = ["x", "y", "z"]
    digests = [hashlib.sha256(b"5\0cat\0" + key.encode()).hexdigest() for key in keys]
    assert longtail.order_images(5, "cat", keys).tolist() == sorted(range(3), key=digests.__getitem__)


def test_order_is_the_same_in_both_unicode_forms() -> None:
    composed, decomposed = ["caf\u00e9", "b"], ["cafe\u0301", "b"]
    order = longtail.order_images(0, "e\u0301", decomposed)
    assert order.tolist() == longtail.order_images(0, "\u00e9", composed).tolist()
