"""SparseVLM in PyTorch on the modules of a transformers Llama: the other side of the benchmark.

Three variants. `faithful` runs as the authors' code does: attention written out in every layer, shapes from data, one
row. `best` is the least that the same algorithm needs: the raters' rows only, fused attention. `batched` is ours: fixed
counts and masks instead of lookups, any batch; the authors' code cannot. All three replay the recorded traces of the
authors' code (tests/test_torch_port.py).

Axis letters: b batch, l sequence length, n heads, k key-value heads, r raters, h head dim, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv, rotate_half

from sparsevlm_jax.bench.torch_pruning import (
    SCORES,
    Merged,
    Raters,
    Selection,
    choose_raters,
    kept_by_rank,
    merge,
    select,
    take,
)
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan, StagePlan


class Variant(NamedTuple):
    """How the port runs; see the head of this file."""

    materialise: bool  # write out softmax(q kᵀ) [b, n, l, l] in every layer
    dynamic: bool  # shapes follow from data: one row at a time


VARIANTS = {
    "faithful": Variant(materialise=True, dynamic=True),
    "best": Variant(materialise=False, dynamic=True),
    "batched": Variant(materialise=False, dynamic=False),
}


class Span(NamedTuple):
    """Where the visual tokens stand in a sequence, in every row of a batch."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Event(NamedTuple):
    """One pruning layer, recorded."""

    layer: int
    scores: Tensor  # [b, v]
    selection: Selection
    merged: Merged | None
    hidden: Tensor  # the sequence after it, [b, l, d]
    positions: Tensor  # [l] or [b, l]


@dataclass
class State:
    """Keys and values [b, k, l, h] of each layer, and the rotary position of the next token in each."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


class SparseDecoder:
    """A transformers Llama decoder whose prefill prunes visual tokens as a plan says.

    Args:
      model: transformers' LlamaModel.
      lm_head: hidden states to logits.
      plan: layers and counts.
      variant: a name in `VARIANTS`.
    """

    def __init__(self, model: Any, lm_head: Any, plan: Plan, variant: str) -> None:
        self.model, self.lm_head, self.plan = model, lm_head, plan
        self.variant = VARIANTS[variant]

    def prefill(
        self, hidden: Tensor, visual: Span, jitter: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State, list[Event]]:
        """Input embeddings [b, l, d] to logits of the next token [b, vocab], the caches, and what pruning did.

        Args:
          visual: where the visual tokens stand.
          jitter: density noise for each token of each pruned sequence, [b, l] a pruning layer; to replay traces.
        """
        sparsity, length, noise = self.plan.sparsity, hidden.shape[1], iter(jitter or ())
        raters = self._raters(hidden, visual)
        positions = torch.arange(length, device=hidden.device)[None]
        state, events = State(), []
        for stage in self.plan.stages:
            state.positions += [length if sparsity.positions == "keep" else hidden.shape[1]] * (
                stage.stop - stage.start
            )
            hidden, query, key = self._run(stage, hidden, positions, state)
            if stage.keep is None or not visual.size:
                continue
            found = self._choose(stage, query, key, positions, raters, visual)
            if found is None:
                continue
            scores, selection = found
            merged = self._recycle(hidden, visual, selection, next(noise, None))
            hidden, positions, visual = self._rebuild(hidden, positions, visual, selection, merged)
            events.append(Event(stage.stop - 1, scores, selection, merged, hidden, positions))
        return self._logits(hidden[:, -1]), state, events

    def decode_step(self, token: Tensor, state: State) -> Tensor:
        """Ids [b] to logits [b, vocab]; the state grows by one token."""
        hidden = self.model.embed_tokens(token)[:, None]
        rotary: dict[int, tuple[Tensor, Tensor]] = {}
        for number, layer in enumerate(self.model.layers):
            position = state.positions[number]
            if position not in rotary:
                rotary[position] = self.model.rotary_emb(hidden, torch.tensor([[position]], device=hidden.device))
            hidden, *_ = self._layer(layer, hidden, rotary[position], state, number)
            state.positions[number] += 1
        return self._logits(hidden[:, 0])

    def _raters(self, hidden: Tensor, visual: Span) -> Raters | None:
        if len(self.plan.stages) == 1:
            return None
        image, text = hidden[:, visual.start : visual.stop], hidden[:, visual.stop :]
        return choose_raters(image, text, self.variant.dynamic)

    def _run(self, stage: StagePlan, hidden: Tensor, positions: Tensor, state: State) -> tuple[Tensor, ...]:
        """The stage's layers; also the last one's queries, or attention where it is written out, and keys."""
        rotary, looked, key = self.model.rotary_emb(hidden, positions), hidden, hidden
        for number in range(stage.start, stage.stop):
            hidden, looked, key = self._layer(self.model.layers[number], hidden, rotary, state, number)
        return hidden, looked, key

    def _layer(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], state: State, number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        heads = (*x.shape[:2], -1, attention.head_dim)
        query, key, value = (
            projection(x).view(heads).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = _cached(state, number, key, value)
        if self.variant.materialise:
            rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
            looked = _probabilities(query, key, rows).to(query.dtype)
            attended = looked @ repeat_kv(value, attention.num_key_value_groups)
        else:
            looked, causal = query, query.shape[2] > 1
            attended = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        hidden = hidden + attention.o_proj(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), looked, key

    def _choose(
        self, stage: StagePlan, looked: Tensor, key: Tensor, positions: Tensor, raters: Raters | None, visual: Span
    ) -> tuple[Tensor, Selection] | None:
        """Scores and selection; None where v1 finds full rank and prunes nothing."""
        assert raters is not None and stage.keep is not None
        sparsity, rows = self.plan.sparsity, raters.rows + visual.stop
        attention = looked[:, :, rows] if self.variant.materialise else _probabilities(looked[:, :, rows], key, rows)
        attention = attention[..., visual.start : visual.stop]

        def gravity() -> Tensor:
            return rotary_gravity(self.model, positions, rows)[:, :, visual.start : visual.stop]

        scores = SCORES[sparsity.method](attention, raters, gravity, sparsity)
        by_rank = METHODS[sparsity.method].counts_are_bounds
        keep = kept_by_rank(attention, sparsity) if by_rank else min(stage.keep, visual.size - 1)
        if keep == visual.size:
            return None
        return scores, select(scores, keep, sparsity.pool(visual.size - keep))

    def _recycle(self, hidden: Tensor, visual: Span, selection: Selection, noise: Tensor | None) -> Merged | None:
        clusters = self.plan.sparsity.clusters(visual.size - selection.kept.shape[1])
        if not clusters:
            return None
        places = selection.pool + visual.start
        jitter = None if noise is None else take(noise, places) * self.plan.sparsity.jitter
        return merge(take(hidden, places), clusters, jitter)

    def _rebuild(
        self, hidden: Tensor, positions: Tensor, visual: Span, selection: Selection, merged: Merged | None
    ) -> tuple[Tensor, Tensor, Span]:
        """Prefix, kept tokens in order, merged ones, text; positions renumbered or kept."""
        kept = take(hidden, selection.kept + visual.start)
        recycled = [] if merged is None else [merged.tokens]
        parts = [hidden[:, : visual.start], kept, *recycled, hidden[:, visual.stop :]]
        after = torch.cat(parts, dim=1)
        standing = Span(visual.start, visual.start + kept.shape[1] + sum(part.shape[1] for part in recycled))
        if self.plan.sparsity.positions == "renumber":
            return after, positions[:, : after.shape[1]], standing
        places = positions.expand(len(hidden), -1)
        image = take(places, selection.kept + visual.start)
        return after, torch.cat([places[:, : visual.start], image, places[:, visual.stop :]], dim=1), standing

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden)).float()


def rotary_gravity(model: Any, positions: Tensor, rows: Tensor) -> Tensor:
    """Rotary kernel of all-ones queries and keys between chosen rows and all tokens, float32 [b, r, l] (v2.0)."""
    cos, sin = model.rotary_emb(torch.ones(1, device=positions.device), positions)
    ones = torch.ones_like(cos)
    rotated = ones * cos + rotate_half(ones) * sin
    return rotated[:, rows] @ rotated.transpose(1, 2) / math.sqrt(rotated.shape[2])


def greedy(decoder: SparseDecoder, logits: Tensor, state: State) -> Iterator[Tensor]:
    """The likeliest tokens [b], one after the other, without end; a token is decoded when the next is asked for."""
    while True:
        token = logits.argmax(dim=-1)
        yield token
        logits = decoder.decode_step(token, state)


def _cached(state: State, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer with the new ones behind them, as transformers' DynamicCache keeps them."""
    if number == len(state.keys):
        state.keys.append(key)
        state.values.append(value)
    else:
        state.keys[number] = torch.cat([state.keys[number], key], dim=2)
        state.values[number] = torch.cat([state.values[number], value], dim=2)
    return state.keys[number], state.values[number]


def _probabilities(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(h) + causal mask), float32 [b, n, r, l], of queries that stand in these rows."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    unseen = torch.arange(key.shape[2], device=key.device) > rows[:, None]
    return torch.softmax(logits.masked_fill(unseen, -torch.inf), dim=-1, dtype=torch.float32)
