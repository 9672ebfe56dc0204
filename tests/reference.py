"""Slow, obvious versions of the library's formulas, in plain Python numbers: what the tests compare with."""

from __future__ import annotations

import math


def exit_pdf(exit_mass: list[float]) -> list[float]:
    undecided, pdf = 1.0, []
    for m in exit_mass:
        pdf.append(undecided * (1.0 - math.exp(-m)))
        undecided *= math.exp(-m)
    return pdf


def accumulate(artifact_prob: list[float], exit_mass: list[float]) -> tuple[list[float], list[float], list[float]]:
    """exit_cdf, cumulative_artifact_prob and cumulative_clean_prob after each step."""
    decided = artifact = clean = 0.0
    cdfs, artifacts, cleans = [], [], []
    for prob, pdf in zip(artifact_prob, exit_pdf(exit_mass), strict=True):
        decided += pdf
        artifact += pdf * prob
        clean += pdf * (1.0 - prob)
        cdfs.append(decided)
        artifacts.append(artifact)
        cleans.append(clean)
    return cdfs, artifacts, cleans


def aborts_by(
    rule: str,
    threshold: float,
    artifact_prob: list[float],
    exit_cdf: list[float],
    cumulative_artifact_prob: list[float],
    *,
    patience: int = 1,
    q: float = 0.5,
) -> int:
    """Each rule as it is told, without a path statistic: the step of the abort, the number of steps where never."""
    alarms = 0
    for t, prob in enumerate(artifact_prob):
        alarms = alarms + 1 if prob >= threshold else 0
        if rule == "cumulative" and cumulative_artifact_prob[t] >= threshold:
            return t
        if rule == "posterior" and prob >= threshold:
            return t
        if rule == "patience" and alarms >= patience:
            return t
        if rule == "q-exit" and exit_cdf[t] > q:
            return t if prob >= threshold else len(artifact_prob)
    return len(artifact_prob)


def gate_weights(
    log_snr: float,
    embedding: list[float],
    *,
    log_snr_range: tuple[float, float],
    width: list[float],
    embedding_weight: list[list[float]],
    top_k: int,
) -> list[float]:
    low, high = log_snr_range
    num_experts = len(width)
    clamped = min(max(log_snr, low), high)
    scores = []
    for k in range(num_experts):
        centre = low + (high - low) * (k + 0.5) / num_experts
        dot = sum(v * e for v, e in zip(embedding_weight[k], embedding, strict=True))
        scores.append(math.exp(-((clamped - centre) ** 2) / (2 * width[k] ** 2) + dot))
    shares = [s / sum(scores) for s in scores]
    kept = sorted(range(num_experts), key=lambda k: -shares[k])[:top_k]
    return [shares[k] / sum(shares[j] for j in kept) if k in kept else 0.0 for k in range(num_experts)]


def expert_state(
    features: list[float],
    weight: list[list[float]],
    bias: list[float],
    projection: list[list[float]],
) -> list[float]:
    """What one expert adds to the state of one row: linear, LayerNorm, SwiGLU, projection."""
    inner = [b + sum(x * weight[i][j] for i, x in enumerate(features)) for j, b in enumerate(bias)]
    mean = sum(inner) / len(inner)
    variance = sum((x - mean) ** 2 for x in inner) / len(inner)
    normed = [(x - mean) / math.sqrt(variance + 1e-5) for x in inner]
    half = len(normed) // 2
    hidden = [normed[j] * normed[half + j] / (1 + math.exp(-normed[half + j])) for j in range(half)]
    return [sum(h * projection[j][d] for j, h in enumerate(hidden)) for d in range(len(projection[0]))]


def interpolated(x: float, centres: list[float], values: list[float]) -> float:
    if x <= centres[0]:
        return values[0]
    for left in range(len(centres) - 1):
        if x <= centres[left + 1]:
            share = (x - centres[left]) / (centres[left + 1] - centres[left])
            return values[left] + share * (values[left + 1] - values[left])
    return values[-1]


def calibration_error(prob: list[float], label: list[float], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(prob) if min(int(p * bins), bins - 1) == b]
        if inside:
            mean_prob = sum(prob[i] for i in inside) / len(inside)
            mean_label = sum(label[i] for i in inside) / len(inside)
            total += len(inside) / len(prob) * abs(mean_prob - mean_label)
    return total


def binomial_tail(k: int, n: int, rate: float) -> float:
    """P(Binomial(n, rate) <= k)."""
    return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k + 1))
