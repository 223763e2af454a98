"""Preference losses once more, in plain floats, from the papers' formulas: what the tensors are compared with.

A pair is a dict of floats: c, r (summed log-probs), rc, rr (the reference's), nc, nr (lengths), nll (of the chosen).
"""

import math


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def score(log_ratio, kind, alpha):
    """f'(t) at t = exp(log_ratio)."""
    t = math.exp(log_ratio)
    return {
        "reverse_kl": lambda: math.log(t),
        "forward_kl": lambda: 1 - 1 / t,
        "js_divergence": lambda: math.log(2 * t / (1 + t)),
        "alpha_divergence": lambda: math.log(t) if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1),
    }[kind]()


def one_pair(name, p, o):
    cr, rr = p["c"] - p["rc"], p["r"] - p["rr"]
    sc, sr = (score(x, o["f_divergence_type"], o["f_alpha_divergence_coef"]) for x in (cr, rr))
    b, e = o["beta"], o["label_smoothing"]
    d = b * (sc - sr)
    mean = sc / p["nc"] - sr / p["nr"]
    if name == "exo_pair":
        q = logistic(d)
        return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
    if name == "discopop":
        m = logistic(d / o["discopop_tau"])
        return -log_sigmoid(d) * (1 - m) + math.exp(-d) * m
    return {
        "sigmoid": lambda: -(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d),
        "hinge": lambda: max(0.0, 1 - d),
        "ipo": lambda: (mean - 1 / (2 * b)) ** 2,
        "nca_pair": lambda: -log_sigmoid(b * cr) - (log_sigmoid(-b * cr) + log_sigmoid(-b * rr)) / 2,
        "robust": lambda: (-(1 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1 - 2 * e),
        "bco_pair": lambda: -log_sigmoid(b * cr) - log_sigmoid(-b * rr),
        "sppo_hard": lambda: (cr - 1 / (2 * b)) ** 2 + (rr + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - logistic(b * cr) + logistic(b * rr),
        "apo_down": lambda: logistic(b * cr) + 1 - logistic(b * (cr - rr)),
        "sft": lambda: p["nll"] / p["mean_nc"],
        "sigmoid_norm": lambda: -log_sigmoid(b * mean),
    }[name]()


def all_pairs(name, pairs, o):
    """The sum over an update's pairs; AOT compares sorted lists."""
    if name not in ("aot", "aot_unpaired"):
        return sum(one_pair(name, p, o) for p in pairs)
    if name == "aot":
        ours, theirs = sorted(p["c"] - p["r"] for p in pairs), sorted(p["rc"] - p["rr"] for p in pairs)
    else:
        ours, theirs = sorted(p["c"] - p["rc"] for p in pairs), sorted(p["r"] - p["rr"] for p in pairs)
    e = o["label_smoothing"]
    margins = [o["beta"] * (x - y) for x, y in zip(ours, theirs, strict=True)]
    return sum(-(1 - e) * log_sigmoid(m) - e * log_sigmoid(-m) for m in margins)


def odds_ratio(chosen, rejected):
    """ORPO's loss of one pair, from mean log-probs."""

    def odds(x):
        return math.exp(x) / (1 - math.exp(x))

    return -log_sigmoid(math.log(odds(chosen) / odds(rejected)))


def cpo(name, chosen, rejected, *, beta, smoothing, gamma, alpha):
    """Of one pair, from sums (sigmoid, hinge) or means (ipo, simpo)."""
    reward = [x if alpha == 0 else (1 - math.exp(x) ** -alpha) / alpha for x in (chosen, rejected)]
    d = reward[0] - reward[1]
    if name == "hinge":
        return max(0.0, 1 - beta * d)
    if name == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    m = beta * (d - gamma / beta) if name == "simpo" else beta * d
    return -(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m)


def kto(ratio, is_good, kl, beta):
    return 1 - logistic(beta * (ratio - kl)) if is_good else 1 - logistic(beta * (kl - ratio))


def apo_zero_unpaired(ratio, is_good, kl, beta):
    return 1 - logistic(beta * ratio) if is_good else logistic(beta * ratio)


def slopes(function, values, step=1e-5):
    """Central differences."""
    found = []
    for place in range(len(values)):
        up, down = list(values), list(values)
        up[place] += step
        down[place] -= step
        found.append((function(up) - function(down)) / (2 * step))
    return found
