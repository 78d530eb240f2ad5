"""From settings, a decoder's sizes and a number of visual tokens to a plan: where a budget becomes counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from sparsevlm_jax.config import ModelConfig, TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan, Rows, StagePlan, require_count
from sparsevlm_jax.pruning.settings import BUDGETS, DEPTH, PRUNING_LAYERS, PUBLISHED_VISUAL_TOKENS, Sparsity
from sparsevlm_jax.pruning.solve import Asked, Cut, Price, cut, layers_entered, layers_left, solve

Number = TypeVar("Number", int, np.ndarray)


class Schedules(NamedTuple):
    """What rows of `counts` visual tokens keep.

    Attributes:
      layers: pruning layers.
      counts: visual tokens of each row.
      asked: what they are asked to keep.
      least, target: the least that each could cost, and what it should.
      setting: which of the budget's settings asks for it.
    """

    layers: tuple[int, ...]
    counts: Int[np.ndarray, "n"]
    asked: Asked
    least: Float[np.ndarray, "n"]
    target: np.ndarray
    setting: str


def make_plan(
    sparsity: Sparsity,
    config: ModelConfig | TextConfig,
    visual_tokens: int,
    text_tokens: int | None = None,
    *,
    row_counts: range | None = None,
    row_texts: Sequence[int] | None = None,
) -> Plan:
    """The schedule of a sparsity for a decoder and a number of visual tokens.

    Args:
      sparsity: the settings.
      config: the model; its depth and sizes are used.
      visual_tokens: in the prompt, all images together; with `row_counts`, columns that a batch has for them.
      text_tokens: columns of the prompt for the others, the same for all rows: a bound for v1's rank, and what
        `flops_share` and `cache_bytes` count beside the visual tokens. The plan then fits no other length. None bounds
        v1's rank by the visual tokens alone, and counts as many others as visual tokens.
      row_counts: numbers of visual tokens that rows may have. Under a budget (`keep`, `flops_share`, `cache_bytes`,
        `ratio` or none) a row keeps what the plan for its own number alone would keep, whatever stands beside it; one
        whose number is below its budget is not pruned, one whose number makes the budget impossible keeps the least
        (`plan_of_row` refuses it). By default, and for counts given by layer or taken from data, all rows follow the
        counts for `visual_tokens`, as far as they have so many.
      row_texts: with `row_counts`, numbers of text tokens, ascending up to `text_tokens`: `flops_share` and
        `cache_bytes` count a row with the smallest that holds its own. By default all rows are counted with
        `text_tokens`, so that what a row keeps depends on the longest text that may stand beside it.

    Raises:
      UserError: a target that no counts reach in any row, or layers or heads that the decoder does not have.
      ValueError: something else than settings, or numbers of tokens that are none.
    """
    if not isinstance(sparsity, Sparsity):
        raise ValueError(f"make_plan takes the settings themselves, as Sparsity.v15() or sparsity(NAME): {sparsity!r}")
    require_count("visual_tokens", visual_tokens)
    if text_tokens is not None:
        require_count("text_tokens", text_tokens)
    texts = () if text_tokens is None else (text_tokens,)
    if row_texts is not None:
        texts = _checked_texts(tuple(row_texts), text_tokens, row_counts)
    if not sparsity.budget.counts_text:
        texts = ()
    _require_rows(row_counts, visual_tokens)
    if row_counts == _one(visual_tokens) and len(texts) < 2:
        row_counts = None
    return replace(_plan(sparsity, config, visual_tokens, text_tokens, row_counts, texts), text_tokens=text_tokens)


def kept_table(plan: Plan) -> Int[np.ndarray, "n p"]:
    """How many visual tokens a row keeps at each pruning layer of the plan, for each number that `plan.rows` knows: all
    of them for the first of its lengths of text, then all for the next."""
    assert plan.rows is not None
    found = _schedules(plan.sparsity, plan.rows)
    return cut(plan.sparsity, found.counts, found.asked).kept[:, int(found.asked.first.min()) :]


def plan_of_row(plan: Plan, visual_tokens: int, text_tokens: int | None = None) -> Plan:
    """What a plan is for a row of so many visual tokens: the plan itself where rows do not follow their own numbers.

    Args:
      text_tokens: columns for the row's other tokens when it is asked alone; None for those of the plan.

    Raises:
      UserError: the budget is below the least that the row can cost.
    """
    if plan.rows is None:
        return plan
    text = plan.text_tokens if text_tokens is None else text_tokens
    texts = (text,) if plan.sparsity.budget.counts_text and text is not None else ()
    alone = _plan(plan.sparsity, plan.rows.decoder, visual_tokens, text, _one(visual_tokens), texts)
    return replace(alone, text_tokens=text, rows=None)


def _one(count: int) -> range:
    return range(count, count + 1)


def _require_rows(row_counts: range | None, visual_tokens: int) -> None:
    if row_counts is None:
        return
    if not row_counts or row_counts.step < 1 or row_counts[0] < 0 or row_counts[-1] > visual_tokens:
        raise ValueError(f"row_counts is {row_counts}: an ascending range within 0 to {visual_tokens} is expected")


def _checked_texts(texts: tuple[int, ...], most: int | None, row_counts: range | None) -> tuple[int, ...]:
    for count in texts:
        require_count("row_texts", count)
    if not texts or list(texts) != sorted(set(texts)) or most is None or texts[-1] > most or row_counts is None:
        raise ValueError(
            f"row_texts is {texts}: ascending numbers up to text_tokens ({most}) are expected, and row_counts too"
        )
    return texts


def _plan(
    sparsity: Sparsity,
    config: ModelConfig | TextConfig,
    visual_tokens: int,
    text_tokens: int | None,
    row_counts: range | None,
    texts: tuple[int, ...],
) -> Plan:
    text, budget, method = _decoder(config), sparsity.budget, METHODS.get(sparsity.method)
    if method is None:
        raise ValueError(f'the method is "{sparsity.method}", METHODS has {", ".join(METHODS)}')
    if sparsity.per_frame and not isinstance(config, TextConfig) and config.video_token_id is None:
        raise UserError(f"`per_frame`: {config.model_type} takes images only, no videos")
    if not method.reduces or not visual_tokens or (row_counts is None and budget.keep == visual_tokens):
        return Plan(sparsity, (_last_stage(0, text.num_hidden_layers, visual_tokens),))
    method.require(sparsity, text)
    if method.shrinks:
        if isinstance(config, TextConfig):
            raise TypeError("shrinking images needs a ModelConfig: a decoder alone does not know their grid")
        return _shrink(sparsity, config, visual_tokens)
    if method.kept_by_rank is not None:
        return _cut_by_rank(sparsity, text.num_hidden_layers, visual_tokens, text_tokens)
    if budget.keep_at is not None:
        return _cut_at(sparsity, text.num_hidden_layers, visual_tokens, budget.keep_at)
    most = visual_tokens if row_counts is None else row_counts[-1]
    if budget.keep is not None and budget.keep > most and row_counts != _one(most):  # `plan_of_row` allows it
        raise UserError(f"keep={budget.keep}: the prompt has only {most} visual tokens")
    rows = Rows(_one(visual_tokens) if row_counts is None else row_counts, text, texts)
    return Plan(sparsity, _afford(sparsity, visual_tokens, rows), rows=None if row_counts is None else rows)


def _decoder(config: ModelConfig | TextConfig) -> TextConfig:
    return config if isinstance(config, TextConfig) else config.text


def scaled_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Published pruning layers of a 32-layer decoder, moved to the same share of another depth."""
    return tuple(sorted({layer * depth // DEPTH for layer in layers}))


def paper_flops(text: TextConfig, tokens: Sequence[int]) -> int:
    """Multiply-adds of a prefill by the paper's formula (section 3.4): sum of 4 n d² + 2 n² d + 3 n d m over layers.

    It leaves out the tower, the projector, lm_head and pruning itself, and counts all heads as key-value heads.

    Args:
      tokens: all tokens, visual or not, entering each layer.
    """
    return sum(_layer_flops(text, n) for n in tokens)


def cache_bytes(text: TextConfig, tokens: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values that a prefill leaves, given the tokens entering each layer."""
    return _token_bytes(text, itemsize) * sum(tokens)


def _layer_flops(text: TextConfig, n: Number) -> Number:
    d, m = text.hidden_size, text.intermediate_size
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def _token_bytes(text: TextConfig, itemsize: int) -> int:
    """Of a token's key and value in one layer."""
    return 2 * text.num_key_value_heads * text.head_dim * itemsize


@lru_cache(maxsize=16)
def _schedules(sparsity: Sparsity, rows: Rows) -> Schedules:
    """What rows of each of these numbers keep, each by itself: for each length of text all numbers of visual tokens."""
    budget, depth = sparsity.budget, rows.decoder.num_hidden_layers
    layers = _checked(pruning_layers(sparsity, depth), depth)
    counts = np.tile(np.array(rows.counts, np.int64), max(len(rows.texts), 1))
    setting = budget.decided_by
    if setting == "ratio" and budget.ratio is not None:
        left = np.stack([(counts * budget.ratio ** (i + 1)).astype(np.int64) for i in range(len(layers))], axis=1)
        nothing = np.zeros(len(counts))
        return Schedules(layers, counts, Asked(left, np.zeros_like(counts)), nothing, nothing, setting)
    price, target = _price(sparsity, rows, counts, layers)
    asked, least = solve(sparsity, counts, len(layers), price, target)
    for keep, published in METHODS[sparsity.method].published_counts.items():
        if setting == "keep" and (*layers, depth) == (*PRUNING_LAYERS, DEPTH):
            here = (counts == PUBLISHED_VISUAL_TOKENS) & (target == keep)
            asked = Asked(np.where(here[:, None], published, asked.counts), np.where(here, 0, asked.first))
    return Schedules(layers, counts, asked, least, target, setting)


def _price(
    sparsity: Sparsity, rows: Rows, counts: Int[np.ndarray, "n"], layers: Sequence[int]
) -> tuple[Price, np.ndarray]:
    """What rows cost in the budget's measure, and what each should."""
    budget, text, depth = sparsity.budget, rows.decoder, rows.decoder.num_hidden_layers
    words = (np.repeat(np.array(rows.texts, np.int64), len(rows.counts)) if rows.texts else counts)[:, None]
    entered = layers_entered(layers, depth)
    if budget.decided_by == "flops_share":
        dense = depth * _layer_flops(text, words + counts[:, None])[:, 0]
        price = Price(lambda visual: _layer_flops(text, words + visual), entered, np.maximum(dense, 1))
        return price, np.full(len(counts), budget.flops_share)
    if budget.decided_by == "cache_bytes":
        price = Price(lambda visual: _token_bytes(text, 2) * (words + visual), entered)
        return price, np.full(len(counts), budget.cache_bytes)
    target = np.maximum(counts // 3, 1) if budget.keep is None else np.full_like(counts, budget.keep)
    return Price(lambda visual: visual, layers_left(layers, depth), depth), target


def _require_reach(found: Schedules, depth: int) -> None:
    """Refuses a target that no row can meet."""
    some = found.counts > 0
    if not some.any() or (found.target >= found.least)[some].any():
        return
    least, places = found.least[some][0], ", ".join(map(str, found.layers))
    lowest = f"{least:.3f}" if least < 1 else f"{least:,.1f}"  # a share, or tokens or bytes
    raise UserError(
        f"{found.setting}={found.target[-1]}: not possible with pruning after layers {places} of {depth}: the least is "
        f"{lowest} (prune earlier with `keep_at`, or ask for more)"
    )


def pruning_layers(sparsity: Sparsity, depth: int) -> tuple[int, ...]:
    """After which layers a decoder of this depth is pruned, where no counts are given by layer."""
    layers = sparsity.budget.layers
    return scaled_layers(sparsity.budget.published_layers, depth) if layers is None else tuple(layers)


def _afford(sparsity: Sparsity, visual_tokens: int, rows: Rows) -> tuple[StagePlan, ...]:
    """Stages for what a budget leaves to rows of these numbers."""
    found, depth = _schedules(sparsity, rows), rows.decoder.num_hidden_layers
    _require_reach(found, depth)
    cuts = cut(sparsity, found.counts, found.asked)
    return _cut(found.layers, depth, visual_tokens, found.asked.first, cuts)


def _cut_at(sparsity: Sparsity, depth: int, visual_tokens: int, keep_at: Sequence[tuple[int, int]]) -> Plan:
    """Stages from (layer, count) pairs; a row keeps at most min(count, visual tokens - 1)."""
    layers = _checked([layer for layer, _ in keep_at], depth)
    asked = Asked(np.array([[count for _, count in keep_at]], np.int64), np.zeros(1, np.int64))
    cuts = cut(sparsity, np.array([visual_tokens]), asked)
    return Plan(sparsity, _cut(layers, depth, visual_tokens, asked.first, cuts))


def _cut(
    layers: Sequence[int], depth: int, visual_tokens: int, first: Int[np.ndarray, "n"], cuts: Cut
) -> tuple[StagePlan, ...]:
    """Stages that hold every row, pruned where any row is."""
    stages, start, visual = [], 0, visual_tokens
    for number in range(int(first.min()), len(layers)):
        keep, pool, clusters = (int(part[:, number].max()) for part in (cuts.kept, cuts.pool, cuts.clusters))
        standing = int(cuts.entering[:, number + 1].max())
        stages.append(StagePlan(start, layers[number] + 1, visual, keep, pool, clusters, standing))
        start, visual = layers[number] + 1, standing
    return (*stages, _last_stage(start, depth, visual))


def _cut_by_rank(sparsity: Sparsity, depth: int, visual_tokens: int, text_tokens: int | None) -> Plan:
    """v1's stages: counts come from data, so every size is the most that any rank can ask for."""
    stages, start, visual = [], 0, visual_tokens
    for layer in _checked(pruning_layers(sparsity, depth), depth):
        stages.append(stage_by_rank(sparsity, start, layer, visual, text_tokens))
        start, visual = layer + 1, stages[-1].standing
    return Plan(sparsity, (*stages, _last_stage(start, depth, visual)))


def stage_by_rank(sparsity: Sparsity, start: int, layer: int, visual: int, text_tokens: int | None) -> StagePlan:
    """A stage that is pruned by rank after `layer`: sizes for the largest rank that `text_tokens` raters can have."""
    largest_rank = visual if text_tokens is None else min(text_tokens, visual)
    kept_by_rank = METHODS[sparsity.method].kept_by_rank
    assert kept_by_rank is not None
    kept = min(kept_by_rank(sparsity, largest_rank), max(visual - 1, 0))
    # A row of full rank is not pruned at all; it has at most `largest_rank` visual tokens.
    keep, standing = max(kept, largest_rank), max(kept + int(sparsity.clusters(visual - kept)), largest_rank)
    pool, clusters = int(sparsity.pool(visual)), int(sparsity.clusters(visual))
    return StagePlan(start, layer + 1, visual, keep, pool, clusters, standing)


def _last_stage(start: int, depth: int, visual: int) -> StagePlan:
    return StagePlan(start, depth, visual, standing=visual)


def _checked(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    if sorted(set(layers)) != list(layers):
        raise UserError(f"pruning layers {list(layers)}: expected them in ascending order, each once")
    if layers and layers[-1] >= depth:
        raise UserError(f"pruning layer {layers[-1]}: the decoder has layers 0 to {depth - 1}")
    return tuple(layers)


def _shrink(sparsity: Sparsity, config: ModelConfig, visual_tokens: int) -> Plan:
    """One stage on images of the largest grid that fits the budget."""
    if config.packs_images:
        raise UserError(
            f"{sparsity.method}: shrinks images that are one square of patches, and those of {config.model_type} are "
            "tiles and rows: choose another `method`"
        )
    if config.image_grid is None:
        raise UserError(
            f"{sparsity.method}: shrinks squares of patches, and vision_feature_select_strategy leaves "
            f"{config.tile_tokens} visual tokens of {config.vision.grid**2} patches: choose another `method`"
        )
    for name in BUDGETS:
        if getattr(sparsity.budget, name):
            METHODS[sparsity.method].refuse_budget(name)
    images, rest = divmod(visual_tokens, config.tokens_per_image)
    if rest:
        raise UserError(
            f"{sparsity.method}: shrinks whole images of {config.tokens_per_image} visual tokens, which "
            f"{visual_tokens} are not"
        )
    keep = sparsity.budget.keep or max(1, visual_tokens // 3)
    grid = isqrt(keep // images)
    if not 1 <= grid <= config.image_grid:
        raise UserError(
            f"keep={keep}: shrunk images of this prompt have {images} to {visual_tokens} visual tokens in all"
        )
    return Plan(sparsity, (_last_stage(0, config.text.num_hidden_layers, images * grid**2),), grid)
