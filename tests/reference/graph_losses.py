"""Slow, obvious edge loops in float64: the published formulas of FF-G2M, GLNN and KRD, one edge at a time."""

import math


def _softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def _divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def low_frequency(student, teacher, edges, nodes, temperature=1.0):
    """1/|E+| sum over directed edges with self-loops of KL(t_j || s_i)."""
    pairs = [*edges, *((i, i) for i in range(nodes))]
    soft = [_softmax([value / temperature for value in row]) for row in teacher]
    mine = [_softmax([value / temperature for value in row]) for row in student]
    return sum(_divergence(soft[j], mine[i]) for i, j in pairs) / len(pairs)


def node_divergence(student, teacher):
    """GLNN: mean over nodes of KL(t_i || s_i)."""
    both = zip(teacher, student, strict=True)
    return sum(_divergence(_softmax(t), _softmax(s)) for t, s in both) / len(student)


def high_frequency(student, teacher, edges, temperature):
    """1/|E-| sum over directed edges of KL(softmax(|h_i - h_j|/tau) || softmax(|z_i - z_j|/tau))."""
    total = 0.0
    for i, j in edges:
        wanted = _softmax([abs(a - b) / temperature for a, b in zip(teacher[i], teacher[j], strict=True)])
        mine = _softmax([abs(a - b) / temperature for a, b in zip(student[i], student[j], strict=True)])
        total += _divergence(wanted, mine)
    return total / len(edges)
