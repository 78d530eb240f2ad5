"""From settings, a decoder's sizes and a number of visual tokens to a plan: where a budget becomes counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import isqrt

from sparsevlm_jax.config import ModelConfig, TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan, StagePlan, require_count
from sparsevlm_jax.pruning.settings import BUDGETS, DEPTH, PRUNING_LAYERS, PUBLISHED_VISUAL_TOKENS, Sparsity


def make_plan(
    sparsity: Sparsity, config: ModelConfig | TextConfig, visual_tokens: int, text_tokens: int | None = None
) -> Plan:
    """The schedule of a sparsity for a decoder and a number of visual tokens.

    Args:
      sparsity: the settings.
      config: the model; its depth and sizes are used.
      visual_tokens: in the prompt, all pictures together.
      text_tokens: columns of the prompt for the others, the same for all rows: a bound for v1's rank. The plan then
        fits no other length. None bounds v1's rank by the visual tokens alone.

    Raises:
      UserError: a target that no counts reach, or layers or heads that the decoder does not have.
      ValueError: something else than settings, or a number of tokens that is none.
    """
    if not isinstance(sparsity, Sparsity):
        raise ValueError(f"make_plan takes the settings themselves, as Sparsity.v15() or sparsity(NAME): {sparsity!r}")
    require_count("visual_tokens", visual_tokens)
    if text_tokens is not None:
        require_count("text_tokens", text_tokens)
    return replace(_plan(sparsity, config, visual_tokens, text_tokens), text_tokens=text_tokens)


def _plan(sparsity: Sparsity, config: ModelConfig | TextConfig, visual_tokens: int, text_tokens: int | None) -> Plan:
    text = config if isinstance(config, TextConfig) else config.text
    depth, method = text.num_hidden_layers, METHODS.get(sparsity.method)
    if method is None:
        raise ValueError(f'the method is "{sparsity.method}", METHODS has {", ".join(METHODS)}')
    if not method.reduces or not visual_tokens or sparsity.budget.keep == visual_tokens:
        return Plan(sparsity, (_last_stage(0, depth, visual_tokens),))
    method.require(sparsity, text)
    if method.shrinks:
        if isinstance(config, TextConfig):
            raise TypeError("shrinking pictures needs the LlavaConfig: a decoder alone does not know their grid")
        return _shrink(sparsity, config, visual_tokens)
    budget = sparsity.budget
    layers = scaled_layers(budget.published_layers, depth) if budget.layers is None else budget.layers
    if method.kept_by_rank is not None:
        return _cut_by_rank(sparsity, depth, visual_tokens, text_tokens, layers)
    if sparsity.budget.keep_at is not None:
        return _cut(sparsity, depth, visual_tokens, sparsity.budget.keep_at)
    if sparsity.budget.keep is not None:
        return _keep(sparsity, depth, visual_tokens, layers, sparsity.budget.keep)
    if sparsity.budget.flops_share is not None or sparsity.budget.cache_bytes is not None:
        words = visual_tokens if text_tokens is None else text_tokens
        return _afford(sparsity, text, visual_tokens, words, layers)
    if sparsity.budget.ratio is not None:
        counts = [int(visual_tokens * sparsity.budget.ratio ** (i + 1)) for i in range(len(layers))]
        return _cut(sparsity, depth, visual_tokens, tuple(zip(layers, counts, strict=True)))
    return _keep(sparsity, depth, visual_tokens, layers, max(1, visual_tokens // 3))


def scaled_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Published pruning layers of a 32-layer decoder, moved to the same share of another depth."""
    return tuple(sorted({layer * depth // DEPTH for layer in layers}))


def paper_flops(text: TextConfig, tokens: Sequence[int]) -> int:
    """Multiply-adds of a prefill by the paper's formula (section 3.4): sum of 4 n d² + 2 n² d + 3 n d m over layers.

    It leaves out the tower, the projector, lm_head and pruning itself, and counts all heads as key-value heads.

    Args:
      tokens: all tokens, visual or not, entering each layer.
    """
    d, m = text.hidden_size, text.intermediate_size
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens)


def cache_bytes(text: TextConfig, tokens: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values that a prefill leaves, given the tokens entering each layer."""
    return 2 * sum(tokens) * text.num_key_value_heads * text.head_dim * itemsize


def _cut(sparsity: Sparsity, depth: int, visual_tokens: int, keep_at: Sequence[tuple[int, int]]) -> Plan:
    """Stages from (layer, count) pairs; a row keeps at most min(count, visual tokens - 1)."""
    _checked([layer for layer, _ in keep_at], depth)
    stages, start, visual = [], 0, visual_tokens
    for layer, count in keep_at:
        keep = min(count, max(visual - 1, 0))
        # A row with fewer visual tokens drops at least one of them too, so one dropped token is always possible.
        dropped = max(visual - keep, min(visual, 1))
        pool, clusters = int(sparsity.pool(dropped)), int(sparsity.clusters(dropped))
        stages.append(StagePlan(start, layer + 1, visual, keep, pool, clusters, keep + clusters))
        start, visual = layer + 1, keep + clusters
    return Plan(sparsity, (*stages, _last_stage(start, depth, visual)))


def _cut_by_rank(
    sparsity: Sparsity, depth: int, visual_tokens: int, text_tokens: int | None, layers: Sequence[int]
) -> Plan:
    """v1's stages: counts come from data, so every size is the most that any rank can ask for."""
    stages, start, visual = [], 0, visual_tokens
    for layer in _checked(layers, depth):
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


def _checked(layers: Sequence[int], depth: int) -> Sequence[int]:
    if sorted(set(layers)) != list(layers):
        raise UserError(f"pruning layers {list(layers)}: expected them in ascending order, each once")
    if layers and layers[-1] >= depth:
        raise UserError(f"pruning layer {layers[-1]}: the decoder has layers 0 to {depth - 1}")
    return layers


def _keep(sparsity: Sparsity, depth: int, visual_tokens: int, layers: Sequence[int], target: int) -> Plan:
    """Counts for a number of equivalent tokens: the published ones where they apply, else solved for."""
    if target > visual_tokens:
        raise UserError(f"keep={target}: the prompt has only {visual_tokens} visual tokens")
    published = METHODS[sparsity.method].published_counts.get(target)
    if published and (*layers, depth, visual_tokens) == (*PRUNING_LAYERS, DEPTH, PUBLISHED_VISUAL_TOKENS):
        return _cut(sparsity, depth, visual_tokens, tuple(zip(layers, published, strict=True)))
    return solve(sparsity, depth, visual_tokens, layers, Plan.equivalent_tokens, target, f"keep={target}")


def _afford(sparsity: Sparsity, text: TextConfig, visual_tokens: int, text_tokens: int, layers: Sequence[int]) -> Plan:
    """Counts for a share of dense FLOPs, or for bytes of keys and values."""
    depth = text.num_hidden_layers
    dense = paper_flops(text, [text_tokens + visual_tokens] * depth)

    def flops_share(plan: Plan) -> float:
        return paper_flops(text, [text_tokens + visual for visual in plan.entering()]) / dense

    def held(plan: Plan) -> float:
        return float(cache_bytes(text, [text_tokens + visual for visual in plan.entering()], itemsize=2))

    if sparsity.budget.flops_share is not None:
        share = sparsity.budget.flops_share
        return solve(sparsity, depth, visual_tokens, layers, flops_share, share, f"flops_share={share}")
    assert sparsity.budget.cache_bytes is not None
    size = sparsity.budget.cache_bytes
    return solve(sparsity, depth, visual_tokens, layers, held, size, f"cache_bytes={size}")


def _shrink(sparsity: Sparsity, config: ModelConfig, visual_tokens: int) -> Plan:
    """One stage on pictures of the largest grid that fits the budget."""
    if config.image_grid is None:
        raise UserError(f'{sparsity.method}: needs vision_feature_select_strategy "default" (a square of patches)')
    for name in BUDGETS:
        if getattr(sparsity.budget, name):
            METHODS[sparsity.method].refuse_budget(name)
    pictures, rest = divmod(visual_tokens, config.tokens_per_image)
    if rest:
        raise UserError(
            f"{sparsity.method}: shrinks whole pictures of {config.tokens_per_image} visual tokens, which "
            f"{visual_tokens} are not"
        )
    keep = sparsity.budget.keep or max(1, visual_tokens // 3)
    grid = isqrt(keep // pictures)
    if not 1 <= grid <= config.image_grid:
        raise UserError(
            f"keep={keep}: shrunk pictures of this prompt have {pictures} to {visual_tokens} visual tokens in all"
        )
    return Plan(sparsity, (_last_stage(0, config.text.num_hidden_layers, pictures * grid**2),), grid)


def solve(
    sparsity: Sparsity,
    depth: int,
    visual_tokens: int,
    layers: Sequence[int],
    cost: Callable[[Plan], float],
    target: int | float,
    option: str,
) -> Plan:
    """The plan whose cost is nearest to a target, among counts that fall by one common factor per pruning layer.

    Counts are visual_tokens * ratio^i at the i-th pruning layer, at least 1; every cost that grows with them
    can be a target (equivalent tokens, FLOPs, cache bytes). Each pruning layer drops a token at least, so a target
    next to dense does without the first of them, and one of dense or more without any.

    Raises:
      UserError: the target is below what keeping one token at every layer costs.
    """

    def plan(layers: Sequence[int], counts: Sequence[int]) -> Plan:
        return _cut(sparsity, depth, visual_tokens, tuple(zip(layers, counts, strict=True)))

    def counts(ratio: float) -> tuple[int, ...]:
        return tuple(max(1, round(visual_tokens * ratio ** (i + 1))) for i in range(len(layers)))

    def reach(layers: Sequence[int]) -> tuple[float, float]:
        return cost(plan(layers, [1] * len(layers))), cost(plan(layers, [visual_tokens] * len(layers)))

    least, most = reach(layers)
    if target < least:
        places = ", ".join(map(str, layers))
        lowest = f"{least:.3f}" if least < 1 else f"{least:,.1f}"  # a share, or tokens or bytes
        raise UserError(
            f"{option}: not possible with pruning after layers {places} of {depth}: the least is {lowest} "
            "(prune earlier with `keep_at`, or ask for more)"
        )
    dense = plan((), ())
    if target >= cost(dense):
        return dense
    while most < target and len(layers) > 1 and reach(layers[1:])[0] <= target:
        layers = layers[1:]
        most = reach(layers)[1]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(plan(layers, counts(middle))) <= target else (low, middle)
    # One step of the ratio may move several counts at once: choose among the corners of that step.
    candidates = product(*({a, b} for a, b in zip(counts(low), counts(high), strict=True)))
    plans = [plan(layers, c) for c in candidates if list(c) == sorted(c, reverse=True)]
    return min(plans, key=lambda p: (abs(cost(p) - target), cost(p)))
