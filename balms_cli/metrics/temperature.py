"""Temperature scaling: one number that makes a classifier's scores as sure as it is right, without changing its answers.

Shapes: N images, C classes.
"""

import numpy as np

LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 40  # log(400) / 2^40: exact to 1e-11
_CHUNK = 4_000_000  # logits whose softmax is held at once, in float64


def fit_temperature(logits_NC: np.ndarray, labels_N: np.ndarray, shift_C: np.ndarray | None = None) -> float | None:
    """The T for which softmax(logits / T + shift) has the least negative log-likelihood on held-out images.

    The likelihood is convex in 1/T, so that its slope has one zero, found by bisection. ``shift_C``: log(prior of these
    images) - log(prior that the logits are right for), -inf for a class that is not among them; None: no difference.
    Returns: None where T would leave 0.05 to 20 (too few images, or all of them right or wrong): there is nothing to go by.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    shift_C = np.zeros(logits_NC.shape[1]) if shift_C is None else shift_C

    def slope(inverse: float) -> float:
        """Of the negative log-likelihood, by 1/T: the sum of E_p[z] - z_label."""
        total, step = 0.0, max(1, _CHUNK // logits_NC.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(labels_N), step)):
            z_BC = logits_NC[rows].astype(np.float64)
            z_BC -= z_BC.max(1, keepdims=True)
            a_BC = inverse * z_BC + shift_C
            p_BC = np.exp(a_BC - a_BC.max(1, keepdims=True))
            p_BC /= p_BC.sum(1, keepdims=True)
            total += float((p_BC * z_BC).sum() - np.take_along_axis(z_BC, labels_N[rows, None], axis=1).sum())
        return total

    if not len(labels_N) or not slope(1 / HIGHEST) < 0 < slope(1 / LOWEST):
        return None
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))
