"""The label-free methods once more, in loops over numpy float64: what the tensor code must agree with.

Written from the equations of docs/label-free.md and the docstrings, one image or one class at a time, with no import from `hf_vs2`
or torch. `e` is one unit embedding `(dim,)`, `W` `(C, dim)` the unit class embeddings, `x` one CLS row `(hidden,)`.
"""

import math

import numpy as np


def unit(v: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(v)
    return v / length if length > 0 else v * 0.0


def softmax(v: np.ndarray) -> np.ndarray:
    v = np.exp(v - v.max())
    return v / v.sum()


def mean_of(vectors) -> np.ndarray:
    total = np.zeros_like(vectors[0])
    for v in vectors:
        total = total + v / len(vectors)
    return total


def text_directions(W: np.ndarray, c: float = 1.0) -> np.ndarray:
    """P0_c = norm(W_c - c mean W); one class is its own mean, and stays."""
    if len(W) == 1:
        return W.copy()
    centre = c * mean_of(W)
    return np.array([unit(w - centre) for w in W])


def scale(mean: np.ndarray, W: np.ndarray, c: float = 1.0) -> float:
    """sqrt(1 - 2c |mean|^2 + c^2 |mean|^2) times the mean length of W_c - c mean W."""
    left = math.sqrt(max(0.0, 1.0 - (2 * c - c * c) * float(mean @ mean)))
    if len(W) == 1:
        return left
    centre = c * mean_of(W)
    return left * sum(float(np.linalg.norm(w - centre)) for w in W) / len(W)


def distribution_norm(e: np.ndarray, W: np.ndarray, mean: np.ndarray, c: float = 1.0) -> np.ndarray:
    q = unit(e - c * mean)
    return np.array([scale(mean, W, c) * float(q @ p) for p in text_directions(W, c)])


def log_odds(logits: np.ndarray, c: int) -> float:
    """log p_c / (1 - p_c): also where p_c is 1 to the last digit. A single label: its logit."""
    others = np.delete(logits, c)
    if not len(others):
        return float(logits[c])
    return float(logits[c] - others.max() - math.log(np.exp(others - others.max()).sum()))


def balanced_mean(E: np.ndarray, W: np.ndarray, surest: int = 20) -> np.ndarray:
    """Each label's mean of its surest rows, weighted by their probability; labels weighted by mass / (mass + 1)."""
    P = np.array([softmax(100.0 * (W @ e)) for e in E])
    total, weight = np.zeros(E.shape[1]), 0.0
    for c in range(len(W)):
        rows = sorted(range(len(E)), key=lambda i: -log_odds(100.0 * (W @ E[i]), c))[:surest]
        mass = sum(P[i, c] for i in rows)
        centre = sum(P[i, c] * E[i] for i in rows) / mass
        total, weight = total + mass / (mass + 1) * centre, weight + mass / (mass + 1)
    return total / weight


def evened(r: np.ndarray) -> np.ndarray:
    """Three times: column c divided by (C mean r_c)^0.5, rows made to sum to 1 again."""
    for _ in range(3):
        column = np.array([(r.shape[1] * r[:, c].mean()) ** 0.5 for c in range(r.shape[1])])
        r = np.array([row / column / (row / column).sum() for row in r])
    return r


def prototypes(E: np.ndarray, W: np.ndarray, mean: np.ndarray, views=()) -> dict:
    """KM-MAP with kappa 200, T 20, 8 iterations, views with weight 2 w_c^2."""
    return iterated(E, W, mean, views, [1.0] * len(E), 200, evened)


def balanced_prototypes(E: np.ndarray, W: np.ndarray) -> dict:
    """kappa 500 and no division of columns; a row counts by how much its labels exceed an even share of the rows."""
    mean, C = balanced_mean(E, W), len(W)
    P0 = text_directions(W)
    r = [softmax(20 * np.array([unit(e - mean) @ p for p in P0])) for e in E]
    received = [sum(row[c] for row in r) for c in range(C)]
    counted = [sum(row[c] * min(1.0, len(E) / (C * received[c])) for c in range(C)) for row in r]
    return iterated(E, W, mean, (), counted, 500, lambda r: r)


def iterated(E, W, mean, views, counted, kappa, balance) -> dict:
    C, n = len(W), len(E)
    P0 = text_directions(W)
    P, w = P0.copy(), np.zeros(C)
    M = [np.zeros((C, view.shape[1])) for view in views]
    q = [unit(e - mean) for e in E]
    for _ in range(8):
        r = np.zeros((n, C))
        for i in range(n):
            seen = [sum(2 * w[c] ** 2 * (view[i] @ M[v][c]) for v, view in enumerate(views)) for c in range(C)]
            r[i] = softmax(20 * np.array([q[i] @ P[c] + seen[c] for c in range(C)]))
        r = balance(r)
        for c in range(C):
            n_c = sum(counted[i] * r[i, c] for i in range(n))
            w[c] = n_c / (n_c + kappa)
            towards = unit(sum(counted[i] * r[i, c] * q[i] for i in range(n)))
            P[c] = unit((1 - w[c]) * P0[c] + w[c] * towards)
            for v, view in enumerate(views):
                M[v][c] = unit(sum(counted[i] * r[i, c] * view[i] for i in range(n)))
    return {"mean": mean, "P": P, "w": w, "n": [k * kappa / (1 - k) for k in w], "M": M, "scale": scale(mean, W)}


def others_say(E: np.ndarray, r: np.ndarray, i: int, c: int) -> tuple[float, float]:
    """Cosine of row i to what all other rows of label c add up to, and how many rows these are."""
    others = [j for j in range(len(E)) if j != i]
    return float(unit(E[i]) @ unit(r[others, c] @ E[others])), float(r[others, c].sum())


def relative(v: np.ndarray, w: np.ndarray, p: np.ndarray) -> np.ndarray:
    """w (v - u), u the mean of v weighted by p w."""
    u = sum(p * w * v) / sum(p * w)
    return np.array([w[c] * (v[c] - u) for c in range(len(v))])


def anchored(E: np.ndarray, W: np.ndarray, T: float) -> dict:
    """The five steps of `fit_anchored_prototypes`, row by row."""
    n, C = len(E), len(W)
    L = np.array([[T * float(e @ w) for w in W] for e in E])
    p = r = np.array([softmax(row) for row in L])
    for _ in range(20):
        prior = np.array([math.log(max(0.1, sum(r[i, c] for i in range(n)) / n)) for c in range(C)])
        r = np.array([softmax(row + prior) for row in L])
    count = r.sum(0)
    share = max(count) / n
    weights = [k / (k + 5) for k in count]
    m = sum(weights[c] * sum(r[i, c] * E[i] for i in range(n)) / count[c] for c in range(C)) / sum(weights)
    X = np.array([unit(e - m) for e in E])

    def look():
        told = [[others_say(X, r, i, c) for c in range(C)] for i in range(n)]
        return np.array([[v for v, _ in row] for row in told]), np.array([[k for _, k in row] for row in told])

    v, left = look()
    each = np.array([[r[i, c] / (count[c] + 5) for c in range(C)] for i in range(n)])

    def entropy(b):
        return -sum(float(each[i] @ np.log(softmax(b * v[i]))) for i in range(n)) / each.sum()

    low, high = 0.0, 100.0  # of a convex function
    for _ in range(60):
        third = (high - low) / 3
        low, high = (low, high - third) if entropy(low + third) < entropy(high - third) else (low + third, high)
    explained = 1 - entropy((low + high) / 2) / math.log(C)
    h = min(1, max(0, (explained - 0.5) / 0.1)) * (1 - min(1, max(0, (share - 0.4) / 0.2)))
    for step in range(2):
        if step:
            v, left = look()
        r = np.array(
            [softmax(L[i] + prior + 22 * h * relative(v[i], left[i] / (left[i] + 20), p[i])) for i in range(n)]
        )
    P = np.array([unit(sum(r[i, c] * X[i] for i in range(n))) for c in range(C)])
    count = r.sum(0)
    return {"m": m, "P": P, "n": count, "w": count / (count + 20), "h": h, "R": explained, "share": share, "T": T}


def anchored_scores(e: np.ndarray, W: np.ndarray, fit: dict) -> np.ndarray:
    plain = W @ e
    v = fit["P"] @ unit(e - fit["m"])
    return plain + 22 * fit["h"] / fit["T"] * relative(v, fit["w"], softmax(fit["T"] * plain))


def prototype_scores(e: np.ndarray, fit: dict, views=()) -> np.ndarray:
    q = unit(e - fit["mean"])
    found = []
    for c, p in enumerate(fit["P"]):
        seen = sum(2 * fit["w"][c] ** 2 * float(a @ M[c]) for a, M in zip(views, fit["M"], strict=True))
        found.append(fit["scale"] * (float(q @ p) + seen))
    return np.array(found)


def whitened(x: np.ndarray, mean: np.ndarray, directions: np.ndarray, variances: np.ndarray) -> np.ndarray:
    floor = 0.05 * float(variances.mean())
    return np.array([(x - mean) @ d / math.sqrt(v + floor) for d, v in zip(directions, variances, strict=True)])


def pca_view(x, mean, directions, variances) -> np.ndarray:
    return unit(whitened(x, mean, directions, variances))


def distance(x, mean, directions, variances) -> float:
    return float((whitened(x, mean, directions, variances) ** 2).mean())


def latent_view(z: np.ndarray, z_mean: np.ndarray, share: np.ndarray) -> np.ndarray:
    """norm((z - z_mean) * idf) of a dense code, idf = -log(share)."""
    return unit(np.array([(z[i] - z_mean[i]) * -math.log(share[i]) for i in range(len(z))]))


def measured(X: np.ndarray, codes: np.ndarray) -> dict:
    """Mean, principal components and latent statistics of rows, two passes."""
    n = len(X)
    mean = mean_of(X)
    spread = X - mean
    values, vectors = np.linalg.eigh(spread.T @ spread / n)
    order = np.argsort(values)[::-1]
    active = [(sum(1 for z in codes if z[i] != 0) + 1) / (n + 1) for i in range(codes.shape[1])]
    return {
        "mean": mean,
        "components": vectors[:, order].T,
        "variances": values[order],
        "latent_mean": mean_of(codes),
        "latent_frequency": np.array(active),
    }
