"""Rules of other people that `scripts/true_clip.py` scores beside the library's, as functions of unit embeddings.

Each takes unlabelled rows `f` `(n, d)`, class embeddings `W` `(C, d)` and the temperature T, and returns a function
from test images to scores. Written from the papers' equations; where these leave something open, the constants are
those of the authors' code, which was read and not copied: TransCLIP (Zanella et al., 2406.01837;
MaxZanella/transduction-for-vlms), ZLaP (Stojnic et al., 2404.04072; vladan-stojnic/ZLaP).
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize


Scores = Callable[[torch.Tensor], torch.Tensor]


def neighbours(rows: torch.Tensor, among: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and numbers of the nearest, `(n, number)` each."""
    found = (rows @ among.T).topk(min(number, len(among)), dim=-1)
    return found.values, found.indices


def sparse(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    places = torch.stack([rows.flatten(), columns.flatten()])
    return torch.sparse_coo_tensor(places, values.flatten(), (size, size), check_invariants=False).coalesce()


def transclip(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
    """
    TransCLIP, zero-shot: it sees all test images at once, here together with the unlabelled ones.

    `z_i ~ y_i exp((log p_i + 50/6 sum_j (w_ij + w_ji) z_j) / 50)`, with the text's `y_i = softmax(T x_i W^T)`,
    Gaussians `log p_ik = -1/2 sum_d (x_id - mu_kd)^2 / var_d` and the cosines w of each row to its three nearest. Ten
    times: five rounds of z, then `mu_k = norm(sum_i z_ik x_i)` and the common diagonal variance; begun from the mean
    of the eight surest rows of each label and a variance of 1/d.
    """

    def scores(images: torch.Tensor) -> torch.Tensor:
        x = torch.cat([f, images])
        text = (T * x @ W.T).softmax(-1)
        z = text
        mass, surest = z.topk(min(8, len(x)), dim=0)
        mu = normalize((mass.T.unsqueeze(-1) * x[surest.T]).sum(1), dim=-1)
        variance = x.new_full((x.shape[1],), 1 / x.shape[1])
        cosines, nearest = neighbours(x, x, 4)
        own = torch.arange(len(x)).unsqueeze(-1).expand(-1, nearest.shape[1] - 1)
        graph = sparse(own, nearest[:, 1:], cosines[:, 1:], len(x))
        graph = (graph + graph.t()).coalesce()
        for number in range(11):
            fits = 2 * (x / variance) @ mu.T - (mu.square() / variance).sum(
                -1
            )  # what is the same for all labels left out
            for _ in range(5):
                z = text * ((fits / 2 + 50 / 6 * torch.sparse.mm(graph, z)) / 50).softmax(-1)
                z = z / z.sum(-1, keepdim=True)
            if number < 10:
                mu = normalize(z.T @ x, dim=-1)
                variance = (x.square() - 2 * x * (z @ mu) + z @ mu.square()).mean(0)
        return z[len(f) :]

    return scores


def zlap(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
    """
    ZLaP, inductive: labels spread over a graph of the unlabelled rows and the texts, and an image asks its neighbours
    in it.

    Edges: the five nearest rows of each row and its five nearest texts, the latter's cosines to the power of 5; made
    symmetric and normalised, `Z = (I - 0.3 A)^-1`. Score c of an image: its own edges, times `Z[:, c]`.
    """
    size = len(W) + len(f)

    def edges(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen, rows_near = neighbours(rows, f, 5)
        told, texts_near = neighbours(rows, W, 5)
        return torch.cat([rows_near + len(W), texts_near], 1), torch.cat(
            [seen.clamp_min(0), told.clamp_min(0) ** 5], 1
        )

    nearest, values = edges(f)
    own = torch.arange(len(W), size).unsqueeze(-1).expand_as(nearest)
    graph = sparse(own, nearest, values * (own != nearest), size)
    graph = (graph + graph.t()).coalesce()
    degree = torch.sparse.sum(graph, 1).to_dense()
    degree = torch.where(degree > 0, degree, 1).rsqrt()
    first, second = graph.indices()
    graph = sparse(first, second, graph.values() * degree[first] * degree[second], size)
    seeds = torch.eye(size, len(W))
    spread = seeds
    for _ in range(20):
        spread = seeds + 0.3 * torch.sparse.mm(graph, spread)

    def scores(images: torch.Tensor) -> torch.Tensor:
        nearest, values = edges(images)
        total = images.new_zeros(len(images), len(W))
        for place in range(nearest.shape[1]):
            total += values[:, place, None] * spread[nearest[:, place]]
        return total

    return scores


def first_rule(beta: float) -> Callable[[torch.Tensor, torch.Tensor, float], Scores]:
    """The rule that `fit_anchored_prototypes` grew out of: it goes by the number of rows of the poorest labels alone."""

    def fitted(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
        logits = T * f @ W.T
        r = logits.softmax(-1)
        n = r.sum(0)
        counted = n / (n + 5)
        mean = (counted.unsqueeze(-1) * (r.T @ f) / n.clamp_min(1e-12).unsqueeze(-1)).sum(0) / counted.sum()
        x = normalize(f - mean, dim=-1)
        poorest = n.quantile(0.1)
        nats = beta * (poorest / (poorest + 20)) ** 2
        for _ in range(2):
            sums = r.T @ x
            dots = x @ sums.T
            squares = sums.square().sum(-1) - 2 * r * dots + r.square()
            r = (logits + nats * (dots - r) / squares.clamp_min(1e-12).sqrt()).softmax(-1)
        prototypes = normalize(r.T @ x, dim=-1)
        return lambda images: T * images @ W.T + nats * normalize(images - mean, dim=-1) @ prototypes.T

    return fitted
