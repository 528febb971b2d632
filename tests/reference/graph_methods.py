"""The published formulas of section 4's methods, one edge, node or pair at a time, in float64 torch scalars.

Written from the papers' equations and apart from the library's operators; gradients come from torch's own.
"""

import itertools
import math

import numpy as np
import torch


def log_soft(row, temperature=1.0):
    return torch.log_softmax(row.double() / temperature, dim=0)


def divergence(teacher_row, student_row, temperature=1.0):
    p, q = log_soft(teacher_row, temperature), log_soft(student_row, temperature)
    return (p.exp() * (p - q)).sum()


def entropy(row):
    p = torch.softmax(row.double(), dim=0)
    return -sum(float(v) * math.log(float(v)) for v in p)


def with_loops(edges, nodes):
    return [*edges, *((i, i) for i in range(nodes))]


def weighted_edges(student, teacher, weighted, temperature=1.0):
    """sum of w KL(t_j || s_i) over (i, j, w)."""
    return sum(w * divergence(teacher[j], student[i], temperature) for i, j, w in weighted)


def krd(student, teacher, edges, keep, temperature):
    """Mean over kept edges and all self-loops of KL(t_j || s_i)."""
    kept = with_loops([edge for edge, kept in zip(edges, keep, strict=True) if kept], len(student))
    return weighted_edges(student, teacher, [(i, j, 1 / len(kept)) for i, j in kept], temperature)


def krd_power(sensitivity, agrees, power, momentum, bins=50):
    """One refit: shares per bin of agreeing nodes, scaled, fitted by 1 - x^alpha at the middles of the bins."""
    share = []
    for k in range(bins):
        last = k == bins - 1
        inside = [
            a for x, a in zip(sensitivity, agrees, strict=True) if k / bins <= x < (k + 1) / bins or (last and x == 1)
        ]
        share.append(sum(inside) / (len(inside) + 1e-6))
    low, high = min(share), max(share)
    share = [(value - low) / (high - low) for value in share]
    best, step, width = power, None, 8.0
    error = lambda alpha: sum((1 - ((k + 0.5) / bins) ** alpha - share[k]) ** 2 for k in range(bins))  # noqa: E731
    while width > 1e-9:  # a shrinking grid search
        step = width / 10
        best = min((best + step * k for k in range(-10, 11) if best + step * k > 0), key=error)
        width /= 3
    return momentum * power + (1 - momentum) * best


def hgmd_probability(teacher, student, edges, sharpness):
    soft = torch.softmax(teacher.double(), dim=1).numpy()
    ht, hs = [entropy(row) for row in teacher], [entropy(row) for row in student]
    ht, hs = [h / max(ht) for h in ht], [h / max(hs) for h in hs]
    out = []
    for i, j in edges:
        cosine = soft[i] @ soft[j] / np.linalg.norm(soft[i]) / np.linalg.norm(soft[j])
        out.append(1 - math.exp(-sharpness * cosine * math.sqrt(ht[i] * hs[i]) / ht[j]))
    return out


def hgmd_mixture(student, teacher, edges, share, temperature):
    total = 0
    for (i, j), w in zip(edges, share, strict=True):
        mixed = (1 - w) * log_soft(teacher[i], temperature).exp() + w * log_soft(teacher[j], temperature).exp()
        total = total + (mixed * (mixed.log() - log_soft(student[i], temperature))).sum()
    return total / len(edges)


def hgmd_weight(student, teacher, edges, probability, temperature):
    soft = torch.softmax(teacher.double(), dim=1).numpy()
    c = [
        p * (soft[i] @ soft[j] / np.linalg.norm(soft[i]) / np.linalg.norm(soft[j]))
        for (i, j), p in zip(edges, probability, strict=True)
    ]
    weighted = []
    for (i, j), mine in zip(edges, c, strict=True):
        around = [other for (a, _), other in zip(edges, c, strict=True) if a == i]
        weighted.append((i, j, len(around) * mine / sum(around) / len(edges)))
    return weighted_edges(student, teacher, weighted, temperature)


def smoother(edges, nodes):
    matrix = np.eye(nodes)
    for i, j in edges:
        matrix[i, j] = 1
    degrees = matrix.sum(axis=1)
    return matrix / np.sqrt(degrees[:, None] * degrees[None, :])


def influence(x, edges):
    """Row sums of min-max-scaled cos(x_i, (S^2 x)_j), over their largest."""
    nodes = len(x)
    s = smoother(edges, nodes)
    far = s @ s @ x
    cosine = np.zeros((nodes, nodes))
    for i, j in itertools.product(range(nodes), repeat=2):
        cosine[i, j] = x[i] @ far[j] / (np.linalg.norm(x[i]) * np.linalg.norm(far[j]))
    scaled = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    sums = scaled.sum(axis=1)
    return sums / sums.max()


def infgrand_edges(student, teacher, edges, weights, gamma_1, gamma_2, temperature):
    pairs = with_loops(edges, len(student))
    values = [divergence(teacher[j], student[i], temperature) for i, j in pairs]
    weighted = [weights[j] * value for (_, j), value in zip(pairs, values, strict=True)]
    return gamma_1 * sum(values) / len(pairs) + gamma_2 * sum(weighted) / len(pairs)


def dirichlet(x, edges):
    """1/N sum over directed edges of the squared distance of unit rows; lengths are constants."""
    unit = [row / row.detach().norm() if float(row.detach().norm()) > 0 else row for row in x]
    return sum((unit[i] - unit[j]).square().sum() for i, j in edges) / len(x)


def dirichlet_gap(steps, teacher_steps, edges):
    total = 0
    for (before, after), (old, new) in zip(steps, teacher_steps, strict=True):
        mine = torch.log(dirichlet(after, edges)) - torch.log(dirichlet(before, edges))
        wanted = torch.log(dirichlet(new, edges)) - torch.log(dirichlet(old, edges))
        total = total + (mine - wanted) ** 2
    return total


def moment_gap(student, teacher, edges, weights, smallest):
    total = 0
    for i in range(len(student)):
        around = [i, *(j for a, j in edges if a == i)]
        gap = 0
        mean_s, mean_t = student[around].mean(dim=0), teacher[around].mean(dim=0)
        gap = gap + (mean_s - mean_t).square().mean()
        spread = [
            torch.sqrt((part[around] - part[around].mean(dim=0)).square().mean(dim=0) + smallest)
            for part in (student, teacher)
        ]
        gap = gap + (spread[0] - spread[1]).square().mean()
        total = total + float(weights[i]) * gap
    return total / len(student)


def likeness_gap(student, teacher):
    total, rows = 0, len(student)
    for i, j in itertools.product(range(rows), repeat=2):
        total = total + ((teacher[i] * teacher[j]).sum() - (student[i] * student[j]).sum()) ** 2
    return total / rows**2


def adaboost(weights, student, teacher, beta):
    """(weights after, vote) of one member."""
    errors = [1 - math.exp(-beta * float(divergence(t, s))) for t, s in zip(teacher, student, strict=True)]
    error = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    vote = max(math.log((1 - error) / error), 1e-16)
    grown = [w * math.exp(vote * e) for w, e in zip(weights, errors, strict=True)]
    return [w / sum(grown) for w in grown], vote


def ollivier_ricci(edges, nodes, i, j):
    """1 - W1 of uniform measures on closed neighbourhoods, by a linear program over all-pairs distances."""
    from scipy.optimize import linprog
    from scipy.sparse.csgraph import shortest_path

    matrix = np.zeros((nodes, nodes))
    for a, b in edges:
        matrix[a, b] = 1
    steps = shortest_path(matrix, unweighted=True)
    first = [i, *np.flatnonzero(matrix[i])]
    second = [j, *np.flatnonzero(matrix[j])]
    cost = steps[np.ix_(first, second)].ravel()
    rows = np.kron(np.eye(len(first)), np.ones(len(second)))
    columns = np.kron(np.ones(len(first)), np.eye(len(second)))
    totals = np.r_[np.full(len(first), 1 / len(first)), np.full(len(second), 1 / len(second))]
    return 1 - linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=totals).fun
