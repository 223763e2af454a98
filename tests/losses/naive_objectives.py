"""Every objective again, as plain float loops from the papers' formulas: the independent side of the tests. Imports nothing of posttrain."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Setting:
    name: str
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sequence: bool = False
    beta: float = 0.0
    kl: str = "k3"
    corrected: bool = True
    threshold: float | None = None
    tau: tuple[float, float] = (1.0, 1.05)  # for good, for other completions
    vespo: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0))  # (k, lambda) likewise


def clip(x, low, high):
    return max(low, min(high, x))


def row_terms(s: Setting, logps, frozen, old, ref, mask, advantage, policy_mask=None):
    """Terms of one completion's tokens. `frozen` are the log-probs seen by whatever is under a stop-gradient."""
    T = len(logps)
    tokens = [t for t in range(T) if mask[t]]

    def weights(lp):
        if s.sequence or s.name == "gspo":
            shared = math.exp(sum(lp[t] - old[t] for t in tokens) / max(len(tokens), 1))
            return [shared] * T
        return [math.exp(lp[t] - old[t]) if mask[t] else 1.0 for t in range(T)]

    live, still = weights(logps), weights(frozen)
    keep = 1.0
    if s.threshold is not None and advantage < 0:
        drift = sum(old[t] - frozen[t] for t in tokens) / max(len(tokens), 1)
        keep = 1.0 if drift <= s.threshold else 0.0
    terms = [0.0] * T
    for t in tokens:
        if s.name == "cispo":
            term = -min(still[t], s.epsilon_high) * advantage * logps[t]
        elif s.name == "sapo":
            tau = s.tau[0] if advantage > 0 else s.tau[1]
            term = -advantage * (4 / tau) / (1 + math.exp(-tau * (live[t] - 1)))
        elif s.name == "vespo":
            k, lam = s.vespo[0] if advantage >= 0 else s.vespo[1]
            log_w = clip(sum(clip(frozen[u] - old[u], -20, 20) for u in tokens), math.log(1e-8), 20)
            term = -(math.exp(log_w) ** k) * math.exp(lam * (1 - math.exp(log_w))) * advantage * logps[t]
        else:
            first = live[t] if s.delta is None else min(live[t], s.delta)
            term = -min(first * advantage, clip(live[t], 1 - s.epsilon, 1 + s.epsilon_high) * advantage)
        term *= keep
        if policy_mask is not None and not policy_mask[t]:
            term = 0.0
        if s.beta:
            x = logps[t] - ref[t]
            if s.kl == "k3":
                term += s.beta * (math.exp(-x) + x - 1) * (live[t] if s.corrected else 1.0)
            if s.kl == "k2":
                term += s.beta * x * x / 2 * (still[t] if s.corrected else 1.0)
        terms[t] = term
    return terms


def aggregate(name, terms, masks, *, max_length, generation_tokens):
    """The step's loss from all its rows' terms, each as the objective's paper averages them."""
    rows = len(terms)
    sums = [sum(term for term, m in zip(row, mask, strict=True) if m) for row, mask in zip(terms, masks, strict=True)]
    lengths = [sum(1 for m in mask if m) for mask in masks]
    if name in ("grpo", "gspo", "sapo"):
        return sum(total / length for total, length in zip(sums, lengths, strict=True) if length) / rows
    if name == "bnpo":
        return sum(sums) / sum(lengths)
    if name == "dr_grpo":
        return sum(sums) / (rows * max_length)
    if name == "luspo":
        return sum(sums) / rows
    return sum(sums) / generation_tokens  # dapo, cispo, vespo
