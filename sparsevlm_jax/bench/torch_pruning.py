"""SparseVLM's choices in PyTorch, as pure functions of tensors: who rates, what scores, who stays, what is merged.

Sources: SparseVLM (arXiv 2410.04417) and the behaviour of the authors' released code. Written from the method's
description, independently of `sparsevlm_jax.pruning`: the two are compared in every run of the benchmark.

Axis letters: b batch, v visual tokens, t text tokens, n heads, r raters, m pool of recycled tokens, c clusters,
h head dim, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsevlm_jax.pruning.methods.sparsevlm import head_options
from sparsevlm_jax.pruning.methods.sparsevlm import kept_by_rank as law
from sparsevlm_jax.pruning.settings import Sparsity


class Raters(NamedTuple):
    """Text rows that rate: their places behind the visual tokens, and which of them count in each row of the batch."""

    rows: Tensor  # int [r]
    counts: Tensor  # bool [b, r]


@dataclass(frozen=True)
class Selection:
    """What becomes of the visual tokens at a pruning layer: places among them.

    Attributes:
      kept: ascending, [b, k].
      pool: recycled ones by falling score, [b, m].
    """

    kept: Tensor
    pool: Tensor


class Merged(NamedTuple):
    """Recycled tokens, and how they were clustered."""

    tokens: Tensor  # [b, c, d]
    centers: Tensor  # [b, c], places in the pool
    assignment: Tensor  # [b, m]


def choose_raters(visual: Tensor, text: Tensor, dynamic: bool) -> Raters:
    """Text more relevant to the image than the average: mean over v of softmax over t of H_v H_tᵀ (equation 3).

    Args:
      visual, text: input embeddings, [b, v, d] and [b, t, d].
      dynamic: look up which rows rate (one row of batch, a host synchronisation, as released) rather than mask them.
    """
    relevance = torch.softmax(visual.float() @ text.float().transpose(1, 2), dim=-1).mean(dim=1)
    counts = relevance > relevance.mean(dim=1, keepdim=True)
    counts = counts | ~counts.any(dim=1, keepdim=True)  # none above the mean: all rate
    if not dynamic:
        return Raters(torch.arange(text.shape[1], device=text.device), counts)
    rows = torch.nonzero(counts[0])[:, 0]
    return Raters(rows, torch.ones(1, len(rows), dtype=torch.bool, device=text.device))


def mean_over_raters(values: Tensor, raters: Raters) -> Tensor:
    """[b, r, v] to [b, v]."""
    counts = raters.counts[:, :, None]
    return (values * counts).sum(dim=1) / counts.sum(dim=1)


def score_by_raters(attention: Tensor, raters: Raters, gravity: Callable[[], Tensor], sparsity: Sparsity) -> Tensor:
    """v1, v1.5: the raters' attention [b, n, r, v], mean over heads, then over raters (equation 4)."""
    return mean_over_raters(attention.float().mean(dim=1), raters)


def score_by_selected_heads(
    attention: Tensor, raters: Raters, gravity: Callable[[], Tensor], sparsity: Sparsity
) -> Tensor:
    """v2.0: attention divided by rotary gravity [b, r, v], mean over the heads that look at the image most."""
    heads = head_options(sparsity).heads
    corrected = attention.float() / gravity()[:, None] * raters.counts[:, None, :, None]
    chosen = corrected.sum(dim=(2, 3)).topk(heads, dim=1).indices
    rows = torch.arange(len(chosen), device=chosen.device)[:, None]
    return mean_over_raters(corrected[rows, chosen].mean(dim=1), raters)


SCORES = {"v1": score_by_raters, "v1.5": score_by_raters, "v2.0": score_by_selected_heads}


def kept_by_rank(attention: Tensor, sparsity: Sparsity) -> int:
    """v1: how many of the v visual tokens stay, from the rank of the raters × visual matrix; all at full rank.

    Source: released code of October 2024; torch.linalg.matrix_rank with its default tolerance.
    """
    visual = attention.shape[3]
    rank = int(torch.linalg.matrix_rank(attention.float().mean(dim=1)[0]))
    return visual if rank == visual else min(law(sparsity, rank), visual - 1)


def select(scores: Tensor, keep: int, pool: int) -> Selection:
    """The `keep` best-scored tokens stay, the next `pool` are recycled."""
    order = scores.topk(keep + pool, dim=1).indices
    return Selection(order[:, :keep].sort(dim=1).values, order[:, keep:])


def merge(pool: Tensor, clusters: int, jitter: Tensor | None = None) -> Merged:
    """Density-peak clustering of [b, m, d] into the means of its clusters (section 3.3, constants as released).

    Ties go to the lower index. `jitter` [b, m] is added to the densities: the released code draws it, at 1e-6.
    """
    x = pool.float()
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[2])
    nearest = distances.topk(clusters, dim=2, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=2))
    if jitter is not None:
        density = density + jitter
    denser = density[:, None, :] > density[:, :, None]
    farthest = distances.amax(dim=(1, 2), keepdim=True)
    peak = density * torch.where(denser, distances, farthest).amin(dim=2)
    centers = peak.sort(dim=1, descending=True, stable=True).indices[:, :clusters]
    assignment = take(distances, centers).argmin(dim=1)
    own = torch.arange(clusters, device=x.device).expand_as(centers)
    assignment = assignment.scatter(1, centers, own)  # a centre is a member of its own cluster
    member = torch.nn.functional.one_hot(assignment, clusters).transpose(1, 2).float()
    means = member @ x / (member.sum(dim=2, keepdim=True) + 1e-6)
    return Merged(means.to(pool.dtype), centers, assignment)


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b, i]], whatever axes follow."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, index]
