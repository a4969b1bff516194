"""A linear classifier on features: logistic regression, its penalty chosen on videos that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlm.errors import InvalidInput
from vlm.evaluation.classification.protocol import ProbeSettings
from vlm.metrics.matrices import Floats

Labels = NDArray[np.int64]
_ITERATIONS = 1000
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier: ``mean`` and ``scale`` (d,) of the features, ``weight`` (classes, d), ``bias``."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (b, classes) float64 of features (b, d) on the probe's device."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)


def fit_probe(
    features: Floats, labels: Labels, num_classes: int, penalty: float, device: torch.device = _CPU
) -> Probe:
    """Return the logistic regression that fits best: the mean cross-entropy plus half the weighted norm.

    Minimised is ``mean(cross_entropy) + penalty / 2 * sum(weight ** 2)`` over features of mean 0 and
    deviation 1, in fp64; the bias is free. The minimum is one, so the outcome does not depend on a seed.

    Args:
        features: (n, d), finite.
        labels: (n,) numbers of the classes.
        num_classes: Rows of the weight, also of classes without an example.
        penalty: Above 0.
        device: Where it is fitted, and where the probe then lies.
    """
    rows = torch.from_numpy(np.asarray(features, np.float64)).to(device)
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    rows, targets = (rows - mean) / scale, torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    shape = (num_classes, rows.shape[1])
    weight = torch.zeros(shape, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(rows, weight, bias), targets) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return Probe(mean, scale, weight.detach(), bias.detach())


def choose_penalty(
    features: Floats,
    labels: Labels,
    groups: Sequence[int],
    num_classes: int,
    settings: ProbeSettings,
    device: torch.device = _CPU,
) -> tuple[float, dict[float, float]]:
    """Return the penalty that is right most often on held-out training videos, and the accuracy of each.

    Of equally good ones that with the smallest cross-entropy there wins. What belongs together, as a clip
    and its twin, stays together.

    Args:
        features: (n, d).
        labels: (n,).
        groups: What each belongs to, any integer labels; (n,).
        num_classes: How many there are.
        settings: Which penalties, and how much is held out.
        device: Where probes are fitted.

    Raises:
        InvalidInput: There are fewer than two groups, so that nothing can be held out.
    """
    owners = np.unique(np.asarray(groups), return_inverse=True)[1]
    num_groups = int(owners.max()) + 1
    if num_groups < 2:
        raise InvalidInput("a linear probe needs at least two training videos, one of them to be held out")
    order = np.random.default_rng(settings.seed).permutation(num_groups)
    num_held_out = min(num_groups - 1, max(1, round(settings.held_out * num_groups)))
    is_held_out = np.isin(owners, order[:num_held_out])
    seen, unseen = features[~is_held_out], torch.from_numpy(features[is_held_out]).to(device)
    targets = torch.from_numpy(labels[is_held_out]).to(device)
    accuracies, losses = {}, {}
    for penalty in settings.penalties:
        logits = fit_probe(seen, labels[~is_held_out], num_classes, penalty, device).logits(unseen)
        accuracies[penalty] = float((logits.argmax(dim=1) == targets).double().mean())
        losses[penalty] = float(F.cross_entropy(logits, targets))
    return max(accuracies, key=lambda penalty: (accuracies[penalty], -losses[penalty])), accuracies
