"""How a run of the library is compared with the NumPy oracle: decisions exactly, numbers within bounds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsevlm_jax import Plan, Recycling, Sparsity, decode_step, prefill
from sparsevlm_jax.config import ModelConfig
from tests import models, oracle

CLOSE, RANK_CLOSE = 1e-5, 3.0  # decisions nearer than this could go either way in float32
SCORES, MERGED, HIDDEN = 1e-5, 5e-5, 2e-4


def run(model: ModelConfig, plan: Plan, new: int) -> Any:
    """Prefill, traced, and greedy decoding in one program: everything that the oracle returns."""

    def program(params: dict[str, Any], batch: Any) -> dict[str, Any]:
        logits, cache_, trace = prefill(params, batch, model, plan, trace=True, max_new_tokens=new)

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
            logits, cache_ = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            after, cache_next = decode_step(params, token, cache_, model, plan)
            return (after, cache_next), (logits, cache_.positions)

        (logits, after), (earlier, positions) = jax.lax.scan(step, (logits, cache_), length=new - 1)
        return {
            "trace": trace,
            "logits": jnp.concatenate([earlier, logits[None]]),
            "positions": positions,
            "lengths": (cache_.lengths, after.lengths),
        }

    return jax.jit(program, compiler_options=models.QUICK)


def wanted(sparsity: Sparsity, keep_at: tuple[tuple[int, int], ...]) -> oracle.Settings:
    """Settings in the oracle's terms; `keep_at` are the counts that the prompt's row keeps."""
    own = {name: value for name, value in asdict(sparsity.options).items() if name in oracle.Settings._fields}
    recycling = sparsity.recycling or Recycling()
    layers, keep = zip(*keep_at, strict=True) if keep_at else (sparsity.budget.layers or (), ())
    return oracle.Settings(
        version=sparsity.method, layers=layers, keep=keep, ratio=recycling.ratio, divisor=recycling.group, **own
    )


def smallest_gravity(event: oracle.Event) -> float:
    """Scores are divided by it, and with them their error; 1 where there is no such thing."""
    return 1.0 if event.rope_weight is None else min(1.0, float(np.abs(event.rope_weight).min()))


def too_close(result: oracle.Result) -> bool:
    margins = [m * smallest_gravity(event) for event in result.events for m in event.margins.values()]
    ratios = [event.rank_ratio for event in result.events]
    return min(margins, default=1.0) < CLOSE or min(ratios, default=9.0) < RANK_CLOSE or result.token_margin < HIDDEN


def compare(found: dict[str, Any], expected: oracle.Result, plan: Plan, row: models.Row, i: int) -> None:
    """Row i of the batch and what the oracle says of it."""
    stage_of = [k for k, stage in enumerate(plan.stages) for _ in range(stage.start, stage.stop)]
    prefilled, filled = found["lengths"]
    np.testing.assert_array_equal(prefilled[stage_of, i], expected.kv_len_prefill)
    np.testing.assert_array_equal(filled[stage_of, i], expected.kv_len_final)
    np.testing.assert_array_equal(found["positions"][:, stage_of, i], expected.decode_positions)
    np.testing.assert_array_equal(found["logits"][:, i].argmax(-1), expected.tokens)
    near(found["logits"][:, i], expected.step_logits, HIDDEN)
    trace = found["trace"]
    near(trace.last_hidden[:, i], expected.layer_last_hidden, HIDDEN)
    after = zip(trace.events, models.origins(trace, i)[1:], strict=True)
    events = [both for both in after if both[0].before.visual[i].any()]  # none are left where none are kept
    for (event, origins), wanted in zip(events, expected.events, strict=True):
        compare_event(jax.tree.map(lambda a: a[i] if np.ndim(a) else a, event), origins, wanted, row[0])


def compare_event(event: Any, origins: np.ndarray, expected: oracle.Event, first: int) -> None:
    """Events of one row without batch axis, and origins [l, o] after them; `first` is where its visual tokens begin."""
    selection = event.selection
    visual = slice(first, first + len(expected.scores))
    assert event.layer == expected.layer
    np.testing.assert_array_equal(event.before.rater_rows[: event.before.rater_count], expected.raters)
    near(event.scores.values[visual], expected.scores, SCORES / smallest_gravity(expected) ** 2)
    np.testing.assert_array_equal(np.flatnonzero(selection.kept) - first, expected.kept)
    np.testing.assert_array_equal(selection.pool[: selection.pool_count] - first, expected.recycled)
    details = event.scores.details
    if expected.rank is not None:
        assert details["rank"] == expected.rank
    if expected.heads is not None:
        r = len(expected.raters)
        np.testing.assert_array_equal(np.flatnonzero(details["heads"]), expected.heads)
        near(details["gravity"][:r, visual], expected.rope_weight, SCORES)
        near(details["head_sums"], expected.head_sums, 1e-4 / smallest_gravity(expected))
    if expected.clusters is not None:
        compare_clusters(event.recycled, expected.clusters)
    else:
        assert selection.cluster_count == 0
    after, wanted = event.after, expected.after
    length = len(wanted.hidden)
    assert after.lengths == length
    np.testing.assert_array_equal(after.positions[:length, 0], wanted.position)
    np.testing.assert_array_equal(np.flatnonzero(after.visual), first + np.arange(wanted.visual))
    near(after.hidden[:length], wanted.hidden, HIDDEN)
    sources = [set(np.flatnonzero(shares)) for shares in origins[first : first + wanted.visual]]
    assert sources == [{s - first for s in wanted.sources[first + j]} for j in range(wanted.visual)]


def compare_clusters(recycled: Any, expected: oracle.Clusters) -> None:
    pool, clusters = len(expected.assign), len(expected.merged)
    if clusters > 1:  # one cluster takes everything, whichever token is its centre
        np.testing.assert_array_equal(recycled.centers[:clusters], expected.centres)
        near(recycled.peak[:pool], expected.score, MERGED)
        near(recycled.distance[:pool], expected.delta, MERGED)
    np.testing.assert_array_equal(recycled.assignment[:pool], expected.assign)
    near(recycled.density[:pool], expected.density, MERGED)
    near(recycled.merged[:clusters], expected.merged, HIDDEN)


def near(found: Any, expected: Any, atol: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def attention_of_last_token(decoder: oracle.Decoder, layer: int, tokens: Any, i: int, places: np.ndarray) -> np.ndarray:
    """In a layer that gets row i of `tokens`, to some places of it; mean over heads."""
    length = tokens.lengths[i]
    empty = np.zeros((decoder.kv_heads, 0, decoder.head_dim))
    hidden, positions = tokens.hidden[i, :length].astype(float), tokens.positions[i, :length, 0]
    _, rows, _ = oracle.run_layer(decoder, layer, hidden, positions, (empty, empty))
    return rows.mean(0)[-1, places]


def check_kept(event: Any, i: int, count: int, scores: np.ndarray) -> None:
    """Of row i the `count` visual tokens with the best scores are kept, and nothing is merged."""
    places = np.flatnonzero(event.before.visual[i])
    best = np.argsort(-scores, kind="stable")[:count]
    np.testing.assert_array_equal(np.flatnonzero(event.selection.kept[i]), places[np.sort(best)])
    assert event.after.lengths[i] == event.before.lengths[i] - len(places) + count


def spread_evenly(n: int, k: int) -> np.ndarray:
    """Scores of n tokens, of which k at even distances are best: the last of k runs of nearly equal length."""
    scores = np.zeros(n)
    scores[-(-np.arange(1, k + 1) * n // max(k, 1)) - 1] = 1
    return scores
