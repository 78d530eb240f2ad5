"""A small random model and ragged batches of prompts, shared by the tests of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sparsevlm_jax import Cache, LlavaConfig, Plan, Prompt, abstract_params, decode_step, prefill, tiny
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.explain import provenance
from sparsevlm_jax.models.parameters import entries
from tests import oracle

LAYERS, WIDTH, VOCAB = 6, 64, 192
PUBLISHED_AT_SIX = (0, 1, 2)  # where SparseVLM's layers 2, 6, 15 of 32 lie in this decoder
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time
Row = tuple[int, int, int]  # tokens before the image, visual tokens, tokens after it


def config(kv_heads: int = 4, image_size: int = 56, layers: int = LAYERS) -> LlavaConfig:
    base = tiny()
    text = replace(base.text, num_hidden_layers=layers, num_key_value_heads=kv_heads)
    return replace(base, text=text, vision=replace(base.vision, image_size=image_size))


@cache
def params(model: LlavaConfig, dtype: str = "float32") -> dict[str, Any]:
    """Random parameters whose attention is far from uniform and whose logits are well apart."""
    random = np.random.default_rng(7)
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(abstract_params(model, jnp.dtype(dtype))))
    for path, leaf in flat.items():
        if path[-1] in ("scale", "bias"):
            middle, std = float(path[-1] == "scale" and not model.text.norm_offset), 0.1
        elif path[-1] == "weight":
            middle, std = 0.0, prod(leaf.shape[1:]) ** -0.5
            std *= {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 4.0}.get(path[-2], 1.0)
        else:
            middle, std = 0.0, 0.5
        flat[path] = jnp.asarray(random.normal(middle, std, leaf.shape), leaf.dtype)
    return traverse_util.unflatten_dict(flat)


def embeddings(row: Row, seed: int) -> np.ndarray:
    """Random input embeddings of a row, float32 [l, width]."""
    return np.random.default_rng(seed).normal(0, 0.5, (sum(row), WIDTH)).astype(np.float32)


def prompt(
    rows: Sequence[Row], *, text: int, visual: int, seeds: Sequence[int] | None = None, dtype: str = "float32"
) -> Prompt:
    """Rows packed into one rectangle of `text` + `visual` columns. The padding is loud: nothing may listen to it."""
    shape = (len(rows), text + visual)
    values, image = np.full((*shape, WIDTH), 30.0, np.float32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        values[i, : sum(row)] = embeddings(row, seeds[i] if seeds else i)
        image[i, row[0] : row[0] + row[1]] = True
    lengths = np.array([sum(row) for row in rows], np.int32)
    saliency = np.where(image, np.abs(values).mean(-1), 0).astype(np.float32)
    return Prompt(jnp.asarray(values, dtype), jnp.asarray(image), jnp.asarray(lengths), jnp.asarray(saliency))


def one_row(batch: Prompt, i: int) -> Prompt:
    """A row of a batch as a batch of its own, in the same rectangle."""
    return jax.tree.map(lambda part: part[i : i + 1], batch)


@cache
def compiled_prefill(model: ModelConfig, plan: Plan, room: int, trace: bool = False) -> Any:
    run = partial(prefill, config=model, plan=plan, max_new_tokens=room, trace=trace)
    return jax.jit(run, compiler_options=QUICK)


@cache
def compiled_step(model: ModelConfig, plan: Plan) -> Any:
    return jax.jit(partial(decode_step, config=model, plan=plan), compiler_options=QUICK)


def forced_logits(
    weights: dict[str, Any], model: ModelConfig, plan: Plan, batch: Prompt, tokens: np.ndarray
) -> tuple[np.ndarray, Cache]:
    """Logits [b, steps + 1, vocab] of a prompt followed by given tokens [b, steps], and the cache behind them."""
    logits, cache, _ = compiled_prefill(model, plan, tokens.shape[1])(weights, batch)
    found = [logits]
    for column in tokens.T:
        logits, cache = compiled_step(model, plan)(weights, jnp.asarray(column), cache)
        found.append(logits)
    return np.stack([np.asarray(x) for x in found], axis=1), cache


def origins(trace: Any, row: int) -> list[np.ndarray]:
    """Of the sequence that enters each stage, what share of each original visual token is in each token: [l, o]."""
    sequences = [trace.tokens, *(event.after for event in trace.events)]
    tables = []
    for tokens, found in zip(sequences, provenance.origins(trace.tokens, trace.events, row), strict=True):
        table = np.zeros((tokens.visual.shape[1], len(found.place)), np.float32)
        standing = np.flatnonzero(found.place != provenance.GONE)
        table[found.place[standing], standing] = found.share[standing]
        tables.append(table)
    return tables


def oracle_decoder(weights: dict[str, Any], model: ModelConfig) -> oracle.Decoder:
    """The same decoder for the NumPy reimplementation."""
    flat = dict(traverse_util.flatten_dict(weights))
    named = {
        name.removeprefix("language_model."): np.asarray(flat[entry.path])
        for name, entry in entries(model).items()
        if name.startswith("language_model.")
    }
    text = model.text
    return oracle.Decoder(
        named,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        rope_theta=text.rope.theta,
        rms_norm_eps=text.rms_norm_eps,
        gemma=text.norm_offset,
    )
