"""How many visual tokens stand where: settings in, a schedule of plain ints out. No arrays here.

A schedule cuts the decoder's layers into stages of one sequence length each. After the last layer of
a stage some visual tokens are dropped, some of those are recycled into a few merged tokens, and the
next stage runs on the shorter sequence. Dense is the schedule of one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt
from numbers import Integral

from sparsevlm_jax.config import LlavaConfig, TextConfig
from sparsevlm_jax.errors import UserError

DEPTH = 32  # decoder layers of the models for which the papers publish layers and counts
PRUNING_LAYERS = (2, 6, 15)  # after which the released code prunes, of 32 layers, 0-based
V1_PRUNING_LAYERS = (2, 6, 15, 19)
PUBLISHED_VISUAL_TOKENS = 576
PUBLISHED_COUNTS = {  # method -> equivalent tokens -> kept at layers 2, 6, 15
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
SHRINKING = ("pool", "downsample")  # methods that make the picture smaller before the decoder
V1_SCALE_AND_BIAS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}


@dataclass(frozen=True)
class Sparsity:
    """What to prune and how.

    The counts come from the first of `scale`, `keep_at`, `keep`, `flops_share`, `cache_bytes` and `ratio` that is set;
    with none of them a third of the visual tokens are kept.

    Attributes:
      method: a name in `methods.METHODS`, which says how tokens are scored; "dense" prunes nothing.
      keep: equivalent tokens as the authors count them: the mean over layers of the visual tokens standing after
        each layer. Their "192" is 192.03.
      keep_at: (layer, count) pairs: after that layer (0-based) keep min(count, visual tokens - 1).
      flops_share: FLOPs of the decoder's prefill by the paper's formula, as a share of dense.
      cache_bytes: bytes of keys and values after the prefill, at two bytes a value.
      ratio: keep this share of what is left at every pruning layer.
      layers: pruning layers where `keep_at` does not name them; -1 is before the first. None scales
        `published_layers`, which are those of a 32-layer decoder, to the model's depth.
      scale, bias: v1 keeps int(rank * scale + bias).
      heads: attention heads that v2.0 selects (14 in the released code, whatever the model).
      gravity_floor: v2.0 bounds its distance correction from below by this; 0 leaves it as released.
      recycle: merge some of the dropped tokens (v1, v1.5) instead of losing them all (v2.0).
      recycle_ratio, recycle_group: int(ratio * dropped) + 1 tokens are merged into int(that / group) + 1.
      positions: rotary positions after pruning, "renumber" (v1, v1.5) or "keep" (v2.0).
      jitter: amplitude of the density noise that replays recorded traces (the array is an argument of `prefill`).
      seed: of methods that draw random numbers; None for those that draw none. `prefill` also takes it traced.
      ladder: run v1's stages as programs of their own, each as long as the rows need, rather than as one program
        with masks. `generate` does; the pure `prefill` has one program in any case.
    """

    method: str
    keep: int | None = None
    keep_at: tuple[tuple[int, int], ...] | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    ratio: float | None = None
    layers: tuple[int, ...] | None = None
    published_layers: tuple[int, ...] = PRUNING_LAYERS
    scale: float | None = None
    bias: float | None = None
    heads: int = 14
    gravity_floor: float = 0.0
    recycle: bool = True
    recycle_ratio: float = 0.3
    recycle_group: int = 10
    positions: str = "renumber"
    jitter: float = 1e-6
    seed: int | None = None
    ladder: bool = False

    def __post_init__(self) -> None:
        if self.positions not in ("renumber", "keep"):
            raise UserError(f'positions is "{self.positions}": expected "renumber" or "keep"')
        if self.keep is not None and self.keep < 1:
            raise UserError(f"--keep {self.keep}: at least 1 visual token has to stay")
        if not 0 <= self.recycle_ratio <= 1 or self.recycle_group < 1:
            raise UserError(
                f"recycle_ratio {self.recycle_ratio} must be in [0, 1], recycle_group {self.recycle_group} at least 1"
            )
        for layer, count in self.keep_at or ():
            if layer < -1 or count < 0:
                raise UserError(f"--keep-at {layer}:{count}: layers count from 0 (-1: before the first), counts too")
        for option, value in (("--scale", self.scale), ("--bias", self.bias)):
            if value is not None and not abs(value) < 1e6:  # nan is not
                raise UserError(f"{option} {value}: a number below a million is expected")
        if self.heads < 1:
            raise UserError(f"--heads {self.heads}: at least 1")
        for option, share in (("--flops-share", self.flops_share), ("ratio", self.ratio)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{option} {share}: a share in (0, 1] is expected")

    @classmethod
    def dense(cls) -> Sparsity:
        """No pruning: one stage."""
        return cls(method="dense", recycle=False)

    @classmethod
    def v15(cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None) -> Sparsity:
        """SparseVLM v1.5: fixed counts, recycling, renumbered positions (the paper's tables come from this line)."""
        return cls(method="v1.5", keep=keep, keep_at=None if keep_at is None else tuple(keep_at))

    @classmethod
    def v1(cls, keep: int | None = None, scale: float | None = None, bias: float | None = None) -> Sparsity:
        """SparseVLM v1: the rank of the raters' attention decides how many stay; recycling, renumbered positions.

        Args:
          keep: 192, 128 or 64, the budgets for which the authors released a scale and a bias.
          scale, bias: instead of `keep`.

        Raises:
          UserError: another `keep`, or neither.
        """
        if scale is None or bias is None:
            if keep not in V1_SCALE_AND_BIAS:
                found = "no budget" if keep is None else f"--keep {keep}"
                known = ", ".join(map(str, V1_SCALE_AND_BIAS))
                raise UserError(f"{found}: v1 knows --keep {known}; for anything else set --scale and --bias")
            scale, bias = V1_SCALE_AND_BIAS[keep]
        return cls(method="v1", scale=scale, bias=bias, published_layers=V1_PRUNING_LAYERS)

    @classmethod
    def v20(
        cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None, heads: int = 14
    ) -> Sparsity:
        """SparseVLM+ (v2.0): gravity correction, head selection, no recycling, positions kept."""
        counts = None if keep_at is None else tuple(keep_at)
        return cls(method="v2.0", keep=keep, keep_at=counts, heads=heads, recycle=False, positions="keep")

    def kept_by_rank(self, rank: int) -> int:
        """v1's law: int(rank * scale + bias), never below zero."""
        assert self.scale is not None and self.bias is not None
        return max(int(rank * self.scale + self.bias), 0)

    def pool(self, dropped: int) -> int:
        """Dropped tokens that are recycled: the best-scored int(ratio * dropped) + 1 (released code; 0.3)."""
        return min(int(self.recycle_ratio * dropped) + 1, dropped) if self.recycle else 0

    def clusters(self, dropped: int) -> int:
        """Merged tokens that they become: int(pool / 10) + 1."""
        pool = self.pool(dropped)
        return min(pool // self.recycle_group + 1, pool)

    def standing(self, visual: int, keep: int) -> int:
        """Visual tokens after pruning `visual` down to min(keep, visual - 1) kept ones, merged tokens included."""
        if not visual:
            return 0
        kept = min(keep, visual - 1)
        return kept + self.clusters(visual - kept)


@dataclass(frozen=True)
class StagePlan:
    """Decoder layers `start` to `stop` - 1, which share one sequence length.

    Attributes:
      start, stop: layers, 0-based; an empty stage (start == stop) only holds the tokens left by the last layer.
      visual: visual tokens that enter, at most; rows of a batch may have fewer.
      keep: visual tokens kept after layer stop - 1, at most; None where nothing is pruned (the last stage).
      pool: dropped tokens that are recycled, at most.
      clusters: merged tokens that they become, at most.
      standing: visual tokens left for the next stage, at most.
    """

    start: int
    stop: int
    visual: int
    keep: int | None = None
    pool: int = 0
    clusters: int = 0
    standing: int = 0


@dataclass(frozen=True)
class Plan:
    """A schedule for one layout of the prompt: hashable, a static argument of `jax.jit`.

    Attributes:
      sparsity: the settings it was made from.
      stages: in order.
      grid: visual tokens per side of a picture, where the picture itself is shrunk ("pool", "downsample").
      text_tokens: room for the other tokens of a prompt, where the plan was made for one length of text.
    """

    sparsity: Sparsity
    stages: tuple[StagePlan, ...]
    grid: int | None = None
    text_tokens: int | None = None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that a prompt may hold under this plan."""
        return self.stages[0].visual

    @property
    def num_layers(self) -> int:
        return self.stages[-1].stop

    @property
    def stops(self) -> tuple[int, ...]:
        """Where each stage ends: all of a plan that decoding depends on."""
        return tuple(stage.stop for stage in self.stages)

    def entering(self, visual: Sequence[int] | None = None) -> list[int]:
        """Visual tokens that enter each layer: what compute costs.

        Args:
          visual: tokens entering each stage in some row, where those are fewer than planned.
        """
        counts = [stage.visual for stage in self.stages] if visual is None else visual
        return [n for stage, n in zip(self.stages, counts, strict=True) for _ in range(stage.start, stage.stop)]

    def standing(self, visual: Sequence[int] | None = None) -> list[int]:
        """Visual tokens standing after each layer: what the authors' budgets count. `visual` as for `entering`."""
        counts = [stage.visual for stage in self.stages] if visual is None else visual
        after: list[int] = []
        for stage, now, then in zip(self.stages, counts, [*counts[1:], counts[-1]], strict=True):
            if stage.start < stage.stop:
                after += [now] * (stage.stop - stage.start - 1) + [then]
        return after

    def equivalent_tokens(self, visual: Sequence[int] | None = None) -> float:
        """Mean over layers of the visual tokens standing after each: the authors' count (their 192 is 192.03)."""
        return sum(self.standing(visual)) / self.num_layers

    def entering_tokens(self, visual: Sequence[int] | None = None) -> float:
        """Mean over layers of the visual tokens entering each: what costs (206.5 for their 192)."""
        return sum(self.entering(visual)) / self.num_layers


def make_plan(
    sparsity: Sparsity, config: LlavaConfig | TextConfig, visual_tokens: int, text_tokens: int | None = None
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


def require_count(name: str, value: object) -> None:
    """Refuses what is no number of things.

    Raises:
      ValueError: not an int, or below 0.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}: a whole number from 0 is expected")


def _plan(sparsity: Sparsity, config: LlavaConfig | TextConfig, visual_tokens: int, text_tokens: int | None) -> Plan:
    text = config.text if isinstance(config, LlavaConfig) else config
    depth = text.num_hidden_layers
    if sparsity.method == "dense" or not visual_tokens or sparsity.keep == visual_tokens:
        return Plan(sparsity, (_last_stage(0, depth, visual_tokens),))
    if sparsity.method == "v2.0" and sparsity.heads > text.num_attention_heads:
        raise UserError(
            f"v2.0 selects {sparsity.heads} heads, the decoder has {text.num_attention_heads}: set --heads to fewer"
        )
    if sparsity.method in SHRINKING:
        if not isinstance(config, LlavaConfig):
            raise TypeError("shrinking pictures needs the LlavaConfig: a decoder alone does not know their grid")
        return _shrink(sparsity, config, visual_tokens)
    layers = scaled_layers(sparsity.published_layers, depth) if sparsity.layers is None else sparsity.layers
    if sparsity.scale is not None:
        return _cut_by_rank(sparsity, depth, visual_tokens, text_tokens, layers)
    if sparsity.keep_at is not None:
        return _cut(sparsity, depth, visual_tokens, sparsity.keep_at)
    if sparsity.keep is not None:
        return _keep(sparsity, depth, visual_tokens, layers, sparsity.keep)
    if sparsity.flops_share is not None or sparsity.cache_bytes is not None:
        words = visual_tokens if text_tokens is None else text_tokens
        return _afford(sparsity, text, visual_tokens, words, layers)
    if sparsity.ratio is not None:
        counts = [int(visual_tokens * sparsity.ratio ** (i + 1)) for i in range(len(layers))]
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
        pool, clusters = sparsity.pool(dropped), sparsity.clusters(dropped)
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
    """A stage that v1 prunes after `layer`: sizes for the largest rank that `text_tokens` raters can have."""
    largest_rank = visual if text_tokens is None else min(text_tokens, visual)
    kept = min(sparsity.kept_by_rank(largest_rank), max(visual - 1, 0))
    # A row of full rank is not pruned at all; it has at most `largest_rank` visual tokens.
    keep, standing = max(kept, largest_rank), max(sparsity.standing(visual, kept), largest_rank)
    return StagePlan(start, layer + 1, visual, keep, sparsity.pool(visual), sparsity.clusters(visual), standing)


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
        raise UserError(f"--keep {target}: the prompt has only {visual_tokens} visual tokens")
    published = PUBLISHED_COUNTS.get(sparsity.method, {}).get(target)
    if published and (*layers, depth, visual_tokens) == (*PRUNING_LAYERS, DEPTH, PUBLISHED_VISUAL_TOKENS):
        return _cut(sparsity, depth, visual_tokens, tuple(zip(layers, published, strict=True)))
    return solve(sparsity, depth, visual_tokens, layers, Plan.equivalent_tokens, target, f"--keep {target}")


def _afford(sparsity: Sparsity, text: TextConfig, visual_tokens: int, text_tokens: int, layers: Sequence[int]) -> Plan:
    """Counts for a share of dense FLOPs, or for bytes of keys and values."""
    depth = text.num_hidden_layers
    dense = paper_flops(text, [text_tokens + visual_tokens] * depth)

    def flops_share(plan: Plan) -> float:
        return paper_flops(text, [text_tokens + visual for visual in plan.entering()]) / dense

    def held(plan: Plan) -> float:
        return float(cache_bytes(text, [text_tokens + visual for visual in plan.entering()], itemsize=2))

    if sparsity.flops_share is not None:
        share = sparsity.flops_share
        return solve(sparsity, depth, visual_tokens, layers, flops_share, share, f"--flops-share {share}")
    assert sparsity.cache_bytes is not None
    size = sparsity.cache_bytes
    return solve(sparsity, depth, visual_tokens, layers, held, size, f"--cache-bytes {size}")


def _shrink(sparsity: Sparsity, config: LlavaConfig, visual_tokens: int) -> Plan:
    """One stage on pictures of the largest grid that fits the budget."""
    if config.vision_feature_select_strategy != "default":
        raise UserError(f'{sparsity.method}: needs vision_feature_select_strategy "default" (a square of patches)')
    if sparsity.keep_at or sparsity.flops_share or sparsity.cache_bytes:
        raise UserError(f"{sparsity.method}: takes --keep only, it shrinks pictures before the decoder")
    pictures, rest = divmod(visual_tokens, config.tokens_per_image)
    if rest:
        raise UserError(
            f"{sparsity.method}: shrinks whole pictures of {config.tokens_per_image} visual tokens, which "
            f"{visual_tokens} are not"
        )
    keep = sparsity.keep or max(1, visual_tokens // 3)
    grid = isqrt(keep // pictures)
    if not 1 <= grid <= config.vision.grid:
        raise UserError(
            f"--keep {keep}: shrunk pictures of this prompt have {pictures} to {visual_tokens} visual tokens in all"
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
            "(prune earlier with --keep-at LAYER:COUNT,..., or ask for more)"
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
