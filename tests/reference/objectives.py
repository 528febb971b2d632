"""Slow, obvious float64 loops: one list, plain Python numbers, `math` only."""

import math
from collections.abc import Sequence

Row = Sequence[float]


def softmax(row: Row, tau: float = 1.0) -> list[float]:
    top = max(row)
    powers = [math.exp((x - top) / tau) for x in row]
    return [power / sum(powers) for power in powers]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def divergence(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def entropy(p: Row) -> float:
    return -sum(a * math.log(a) for a in p)


def kl(s: Row, t: Row) -> float:
    return divergence(softmax(t), softmax(s))


def reverse_kl(s: Row, t: Row) -> float:
    return divergence(softmax(s), softmax(t))


def jensen_shannon(s: Row, t: Row) -> float:
    p, q = softmax(t), softmax(s)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (divergence(p, m) + divergence(q, m)) / 2


def jeffreys(s: Row, t: Row) -> float:
    return kl(s, t) + reverse_kl(s, t)


def balanced_kl(s: Row, t: Row) -> float:
    over_confident = entropy(softmax(t)) > entropy(softmax(s))
    forward, backward = (2, 1) if over_confident else (1, 2)
    return forward * kl(s, t) + backward * reverse_kl(s, t)


def listnet(s: Row, t: Row) -> float:
    return -sum(p * math.log(q) for p, q in zip(softmax(t), softmax(s), strict=True))


def teacher_order(t: Row) -> list[int]:
    return sorted(range(len(t)), key=lambda i: -t[i])


def likelihood(s: Row, order: Sequence[int], alpha: Row) -> float:
    total = 0.0
    for k, chosen in enumerate(order):
        left = sum(math.exp(s[i]) for i in order[k:])
        total += alpha[chosen] * (math.log(left) - s[chosen])
    return total


def listmle(s: Row, t: Row) -> float:
    return likelihood(s, teacher_order(t), [1.0] * len(s))


def plackett_luce(s: Row, t: Row) -> float:
    return likelihood(s, teacher_order(t), softmax(t))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def margin_mse(s: Row, t: Row) -> float:
    return mean([((s[0] - s[k]) - (t[0] - t[k])) ** 2 for k in range(1, len(s))])


def margin_mse_all(s: Row, t: Row) -> float:
    n = len(s)
    return mean([((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i in range(n) for j in range(n) if i < j])


def pointwise_mse(s: Row, t: Row) -> float:
    return mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)])


def _ordered(t: Row) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(t)) for j in range(len(t)) if t[i] > t[j]]


def ranknet(s: Row, t: Row) -> float:
    return mean([softplus(s[j] - s[i]) for i, j in _ordered(t)])


def soft_ranknet(s: Row, t: Row) -> float:
    out = []
    for i in range(len(s)):
        for j in range(i + 1, len(s)):
            p = 1 / (1 + math.exp(t[j] - t[i]))
            out.append(p * softplus(s[j] - s[i]) + (1 - p) * softplus(s[i] - s[j]))
    return mean(out)


def weighted_ranknet(s: Row, t: Row) -> float:
    return mean([(t[i] - t[j]) * softplus(s[j] - s[i]) for i, j in _ordered(t)])


def pairwise_logistic(s: Row, t: Row) -> float:
    return mean([softplus(-((s[i] - s[j]) - (t[i] - t[j]))) for i, j in _ordered(t)])


def hinge(s: Row, t: Row) -> float:
    return mean([max(0.0, 1 - (s[i] - s[j])) for i, j in _ordered(t)])
