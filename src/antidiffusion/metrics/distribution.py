"""How far two sets of pictures are apart as distributions: pure functions of their features."""

import torch
from torch import Tensor

DEGREE = 3  # Binkowski et al. 2018, section 4: the kernel (x.y / d + 1)^3


@torch.no_grad()
def kid(features_a: Tensor, features_b: Tensor) -> float:
    """Return the kernel distance: the unbiased squared maximum mean discrepancy under a cubic polynomial kernel.

    Uses all features at once, where the paper averages over subsets: the expectation is the same, the spread smaller.

    Arguments:
        features_a: `(N, d)`, N at least 2.
        features_b: `(M, d)`, M at least 2.

    Returns:
        About 0 for two samples of one distribution, and then as often below as above.

    Raises:
        ValueError: If the features do not fit each other.

    References:
        Demystifying MMD GANs, Binkowski et al., 2018, arXiv 1801.01401
    """
    a, b = _checked(features_a, features_b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** DEGREE

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


@torch.no_grad()
def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Return the squared Frechet distance of the normal distributions fitted to two sets of features.

    The trace of (C_a C_b)^(1/2) is the sum of the singular values of A B^T, where C_a = A^T A and A holds the centred
    features over sqrt(N - 1). That needs no matrix root and no ridge, and is exact where N < d makes C_a singular.

    Arguments:
        features_a: `(N, d)`, N at least 2.
        features_b: `(M, d)`, M at least 2.

    Returns:
        0 or more. Biased upwards, the more the smaller N and M: compare figures of equal N and M only.

    Raises:
        ValueError: If the features do not fit each other.

    References:
        GANs Trained by a Two Time-Scale Update Rule, Heusel et al., 2017, arXiv 1706.08500
    """
    a, b = _checked(features_a, features_b)
    root_a, root_b = _root(a), _root(b)
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(means + root_a.square().sum() + root_b.square().sum() - 2 * shared))


def _root(x: Tensor) -> Tensor:
    """Return R with R^T R the covariance of x `(N, d)`, at most d rows."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, in which sums over thousands of products keep enough digits."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1] or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"expected features (N, d) and (M, d), N and M at least 2, got {shapes}; take more pictures")
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity; check the pictures and the network")
    return a, b
