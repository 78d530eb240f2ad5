"""SparseVLM a second time, in plain NumPy float64 and plain loops, for the tests to compare the library with.

It knows nothing of the library: weights come in under the names of Hugging Face's LlamaForCausalLM (or, with `gemma`,
GemmaForCausalLM), prompts as input
embeddings [l, d] with one block of visual tokens. Batch of one, no padding. Every decision leaves its margin behind
(`Event.margins`), so that a caller can discard cases which float32 could decide either way.

Axis letters: l sequence, d width, v visual, t text after the image, r raters, n heads, k key-value heads, h head dim,
m recycled tokens, c clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FAR = float("inf")  # the margin where there was nothing to decide
JITTER_AMPLITUDE = 1e-6


class Decoder(NamedTuple):
    weights: Mapping[str, np.ndarray]  # linear weights are [out, in]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    gemma: bool = False  # norms multiply by 1 + weight, gelu (tanh) for silu, looked up embeddings times sqrt(d)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.rms_norm_eps)
        return normed * (f64(self.weights[f"model.{name}.weight"]) + self.gemma)

    def act(self, x: np.ndarray) -> np.ndarray:
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        return x * (1 + np.tanh(inner)) / 2 if self.gemma else x / (1 + np.exp(-x))

    def look_up(self, token: int) -> np.ndarray:
        row = f64(self.weights["model.embed_tokens.weight"])[[token]]
        return row * np.sqrt(row.shape[-1]) if self.gemma else row


class Settings(NamedTuple):
    version: str = "dense"  # "dense", "v1", "v1.5" or "v2.0"
    layers: Sequence[int] = ()  # 0-based, ascending; the output of these layers is pruned
    keep: Sequence[int] = ()  # v1.5, v2.0: one count per layer
    scale: float = 13.5  # v1: kept = int(rank * scale + bias)
    bias: float = 0.0
    heads: int = 14  # v2.0
    ratio: float = 0.3  # recycled share of the deleted tokens
    divisor: float = 10  # recycled tokens per cluster
    jitter: Sequence[np.ndarray] = ()  # per event, uniform numbers [m] in [0, 1)


class Clusters(NamedTuple):
    merged: np.ndarray  # [c, d]
    centres: np.ndarray  # [c] in output order
    assign: np.ndarray  # [m]
    density: np.ndarray  # [m]
    delta: np.ndarray  # [m] distance to the nearest denser token
    score: np.ndarray  # [m] density * delta
    margins: dict[str, float]


class Tokens(NamedTuple):
    hidden: np.ndarray  # [l, d]
    position: np.ndarray  # [l] rotary position
    origin: np.ndarray  # [l] original sequence position, -1 for merged rows
    sources: list[tuple[int, ...]]  # per row, the original sequence positions that are in it
    visual: int  # number of visual rows, merged ones included


class Event(NamedTuple):
    layer: int
    raters: np.ndarray  # [r] rows of the sequence that entered the layer
    attention: np.ndarray  # [n, r, v] probabilities, uncorrected
    scores: np.ndarray  # [v]
    rope_weight: np.ndarray | None  # [r, v], v2.0
    head_sums: np.ndarray | None  # [n], v2.0
    heads: np.ndarray | None  # chosen, ascending, v2.0
    rank: int | None  # v1
    rank_ratio: float  # how many times the nearest singular value is away from the tolerance, >= 1
    kept: np.ndarray  # ascending, relative to the visual block
    recycled: np.ndarray  # [m] falling score, relative to the visual block
    clusters: Clusters | None  # None where nothing is recycled
    after: Tokens
    margins: dict[str, float]  # the distance of each decision from going the other way


class Result(NamedTuple):
    raters: np.ndarray  # [r] relative to the first text token
    relevance: np.ndarray  # [t]
    events: list[Event]
    tokens: list[int]
    token_margin: float  # narrowest gap between the best and the second logit of a step
    step_logits: np.ndarray  # [steps, vocab]
    final_hidden: np.ndarray  # [l', d] after the final norm, prefill
    layer_last_hidden: np.ndarray  # [layers, d] last row after every layer, pruned, before the final norm
    kv_len_prefill: list[int]  # per layer
    kv_len_final: list[int]
    decode_positions: np.ndarray  # [steps - 1, layers]

    def closest(self) -> float:
        """The narrowest margin of all events; the rank's ratio is of another kind, see `Event.rank_ratio`."""
        return min((margin for event in self.events for margin in event.margins.values()), default=FAR)


def raters(visual: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """visual [v, d], text [t, d] -> indices [r] (all of the text if none is above the mean), relevance [t], margin."""
    if len(visual) == 0 or len(text) == 0:
        return np.arange(len(text)), np.zeros(len(text)), FAR
    relevance = softmax(f64(visual) @ f64(text).T).mean(0)
    mean = relevance.mean()
    index = np.flatnonzero(relevance > mean)
    margin = float(np.abs(relevance / mean - 1).min()) if len(text) > 1 else FAR
    return index if index.size else np.arange(len(text)), relevance, margin


def scores(attention: np.ndarray) -> np.ndarray:
    """[n, r, v] -> [v]."""
    return f64(attention).mean(0).mean(0)


def angles(position: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """[...] -> [..., h/2]. Rounded to float32 like the tables of every recorded run, the float64 ones among them.

    It shows, down to the last bit of the frequencies, where a rotary weight is nearly zero, because scores are divided
    by it: hence power first, then the inverse.
    """
    power = np.asarray(theta ** (np.arange(0, head_dim, 2) / head_dim), np.float32)
    return f64(np.asarray(position, np.float32)[..., None] * (1 / power))


def rope_weight(query: np.ndarray, key: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Positions [r], [v] -> [r, v]: what rotation leaves of the product of an all-ones query and key.

    Changes sign at large distances. As in the recorded runs there is neither a clamp nor an absolute value.
    """
    apart = angles(query, head_dim, theta)[:, None] - angles(key, head_dim, theta)
    return 2 / np.sqrt(head_dim) * np.cos(apart).sum(-1)


def select_heads(corrected: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """corrected [n, r, v] -> sums [n], the `count` heads with the largest ones, margin."""
    if count > len(corrected):
        raise ValueError(f"{count} heads of {len(corrected)}")
    sums = f64(corrected).sum((1, 2))
    best = falling(sums)
    return sums, np.sort(best[:count]), gap(sums, best, count)


def numerical_rank(matrix: np.ndarray) -> tuple[int, np.ndarray, float]:
    """[r, v] -> its rank at float32 tolerance max(r, v) * eps * largest singular value, singular values, ratio."""
    singular = np.linalg.svd(f64(np.float32(matrix)), compute_uv=False)
    tolerance = max(matrix.shape) * float(np.finfo(np.float32).eps) * singular.max()
    counted, rest = singular[singular > tolerance], singular[singular <= tolerance]
    above = counted.min() / tolerance if counted.size else FAR
    below = tolerance / rest.max() if rest.size and rest.max() > 0 else FAR
    return len(counted), singular, float(min(above, below))


def pool_sizes(deleted: int, ratio: float, divisor: float) -> tuple[int, int]:
    """How many deleted tokens are recycled, and into how many clusters."""
    pool = int(ratio * deleted) + 1
    return pool, int(pool / divisor) + 1


def cluster(x: np.ndarray, c: int, jitter: np.ndarray | None = None) -> Clusters:
    """Density-peak clustering of x [m, d] into c tokens; ties go to the lower index."""
    x = f64(x)
    m, d = x.shape
    # From differences, so that dist is exactly symmetric: for c = 2 the outcome hangs on exact ties.
    dist = np.stack([np.sqrt(((row - x) ** 2).sum(-1) / d) for row in x])
    density = np.array([np.exp(-(np.sort(row)[:c] ** 2).mean()) for row in dist])
    if jitter is not None:
        density = density + f64(jitter) * JITTER_AMPLITUDE
    delta = np.array([dist[i][density > density[i]].min(initial=dist.max()) for i in range(m)])
    score = density * delta
    order = falling(score)
    centres = order[:c]
    assign = np.array([dist[i, centres].argmin() for i in range(m)])
    assign[centres] = np.arange(c)
    merged = np.stack([x[assign == i].sum(0) / ((assign == i).sum() + 1e-6) for i in range(c)])

    margins = {}
    if c > 1:  # a single cluster takes everything, whichever token is its centre
        margins["centre"] = gap(score, order, c)
        apart = score[centres][:-1] - score[centres][1:]  # an exact tie stays one in any precision
        margins["centre_order"] = min(apart[apart > 0], default=FAR)
        # Swapping a denser token i with j counts where it would change the delta of one of them.
        higher = density[:, None] - density
        matters = (higher > 0) & ((dist <= delta[:, None]) | (dist <= delta))
        margins["density"] = higher[matters].min(initial=FAR)
        nearest = np.sort(np.delete(dist[:, centres], centres, axis=0))
        margins["assign"] = (nearest[:, 1] - nearest[:, 0]).min(initial=FAR)
    return Clusters(merged, centres, assign, density, delta, score, {k: float(v) for k, v in margins.items()})


def prune(model: Decoder, settings: Settings, k: int, tokens: Tokens, attention: np.ndarray, v_start: int, rows):
    """Event k. tokens: the layer's output; attention [n, l, l]: its probabilities; rows [r]: the raters' places."""
    if len(rows) == 0:
        raise ValueError("a prompt of visual tokens only has no raters")
    v = tokens.visual
    weight = sums = heads = rank = clusters = None
    attention = seen = attention[:, rows, v_start : v_start + v]
    recycled, ratio, margins = np.arange(0), FAR, {}
    if settings.version == "v2.0":
        visual_positions = tokens.position[v_start : v_start + v]
        weight = rope_weight(tokens.position[rows], visual_positions, model.head_dim, model.rope_theta)
        sums, heads, margins["heads"] = select_heads(attention / weight, settings.heads)
        seen = (attention / weight)[heads]
    score = scores(seen)
    order = falling(score)

    if settings.version == "v1":
        rank, _, ratio = numerical_rank(attention.mean(0))
        count = v if rank == v else min(int(rank * settings.scale + settings.bias), v - 1)
    else:
        count = min(settings.keep[k], v - 1)
    if count < 0:
        raise ValueError(f"{count} tokens to keep")
    kept = np.sort(order[:count])
    margins["keep"] = gap(score, order, count)

    new, members = np.zeros((0, tokens.hidden.shape[1])), []
    if settings.version != "v2.0" and count < v:
        m, c = pool_sizes(v - count, settings.ratio, settings.divisor)
        recycled = order[count : count + m]
        margins["recycled"] = gap(score, order, count + m)
        clusters = cluster(tokens.hidden[v_start + recycled], c, settings.jitter[k] if settings.jitter else None)
        margins |= clusters.margins
        if len(np.unique(clusters.score[clusters.centres])) < c:  # among tied centres the order of the pool decides
            margins["recycled_order"] = float((score[recycled][:-1] - score[recycled][1:]).min())
        new, members = clusters.merged, [recycled[clusters.assign == i] for i in range(c)]

    before, after = np.r_[0:v_start, v_start + kept], np.r_[v_start + v : len(tokens.hidden)]
    hidden = np.concatenate([tokens.hidden[before], new, tokens.hidden[after]])
    position = np.arange(len(hidden)) if settings.version != "v2.0" else tokens.position[np.r_[before, after]]
    origin = np.r_[tokens.origin[before], np.full(len(new), -1), tokens.origin[after]]
    merged = [tuple(sorted(s for j in group for s in tokens.sources[v_start + j])) for group in members]
    sources = [tokens.sources[j] for j in before] + merged + [tokens.sources[j] for j in after]
    return Event(
        layer=settings.layers[k],
        raters=rows,
        attention=attention,
        scores=score,
        rope_weight=weight,
        head_sums=sums,
        heads=heads,
        rank=rank,
        rank_ratio=ratio,
        kept=kept,
        recycled=recycled,
        clusters=clusters,
        after=Tokens(hidden, position, origin, sources, count + len(new)),
        margins=margins,
    )


def run_layer(model: Decoder, i: int, x: np.ndarray, position: np.ndarray, cache: tuple[np.ndarray, np.ndarray]):
    """x [l, d] behind a cache of keys and values [k, s, h] -> output [l, d], probabilities [n, l, s + l], cache."""
    weights, h = model.weights, model.head_dim
    block, length, past = f"model.layers.{i}", len(x), cache[0].shape[1]

    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ f64(weights[f"{block}.{name}.weight"]).T + f64(weights.get(f"{block}.{name}.bias", 0))

    def project(name: str, heads: int) -> np.ndarray:
        return linear(y, f"self_attn.{name}").reshape(length, heads, h).swapaxes(0, 1)

    y = model.norm(x, f"layers.{i}.input_layernorm")
    q = rotate(project("q_proj", model.heads), position, model.rope_theta)
    keys = np.concatenate([cache[0], rotate(project("k_proj", model.kv_heads), position, model.rope_theta)], 1)
    values = np.concatenate([cache[1], project("v_proj", model.kv_heads)], 1)
    visible = np.arange(past + length) <= past + np.arange(length)[:, None]
    probabilities, mixed = [], []
    for n in range(model.heads):
        group = n // (model.heads // model.kv_heads)
        probabilities.append(softmax(np.where(visible, q[n] @ keys[group].T / np.sqrt(h), -np.inf)))
        mixed.append(probabilities[n] @ values[group])
    x = x + linear(np.concatenate(mixed, -1), "self_attn.o_proj")

    y = model.norm(x, f"layers.{i}.post_attention_layernorm")
    x = x + linear(model.act(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    return x, np.stack(probabilities), (keys, values)


def generate(model: Decoder, embeds: np.ndarray, v_start: int, v_num: int, settings: Settings, steps: int) -> Result:
    """embeds [l, d], visual tokens at v_start .. v_start + v_num -> `steps` greedy tokens and all that led to them."""
    length, text_start = len(embeds), v_start + v_num
    index, relevance, rater_margin = raters(embeds[v_start:text_start], embeds[text_start:])
    tokens = Tokens(f64(embeds), np.arange(length), np.arange(length), [(j,) for j in range(length)], v_num)
    empty = np.zeros((model.kv_heads, 0, model.head_dim))
    caches, events, last_hidden = [(empty, empty)] * model.layers, [], []
    for i in range(model.layers):
        hidden, attention, caches[i] = run_layer(model, i, tokens.hidden, tokens.position, caches[i])
        tokens = tokens._replace(hidden=hidden)
        if settings.version != "dense" and i in settings.layers and tokens.visual:
            # Where no text follows the image the tokens before it stand in. They see no visual token: all scores are 0.
            rows = v_start + tokens.visual + index if length > text_start else np.arange(v_start)
            event = prune(model, settings, len(events), tokens, attention, v_start, rows)
            event.margins["rater"] = rater_margin
            events.append(event)
            tokens = event.after
        last_hidden.append(tokens.hidden[-1])
    prefill_lengths = [keys.shape[1] for keys, _ in caches]

    head = f64(model.weights.get("lm_head.weight", model.weights["model.embed_tokens.weight"]))
    final = model.norm(tokens.hidden, "norm")
    logits, positions = [final[-1] @ head.T], []
    for step in range(steps - 1):
        x = model.look_up(logits[-1].argmax())
        own = settings.version in ("v1", "v1.5")  # each layer counts its own cache, the other versions the whole prompt
        positions.append([keys.shape[1] if own else length + step for keys, _ in caches])
        for i in range(model.layers):
            x, _, caches[i] = run_layer(model, i, x, np.array([positions[-1][i]]), caches[i])
        logits.append(model.norm(x, "norm")[-1] @ head.T)
    ranked = np.sort(np.stack(logits), -1)
    return Result(
        raters=index,
        relevance=relevance,
        events=events,
        tokens=[int(row.argmax()) for row in logits],
        token_margin=float((ranked[:, -1] - ranked[:, -2]).min()),
        step_logits=np.stack(logits),
        final_hidden=final,
        layer_last_hidden=np.stack(last_hidden),
        kv_len_prefill=prefill_lengths,
        kv_len_final=[keys.shape[1] for keys, _ in caches],
        decode_positions=np.array(positions, dtype=int).reshape(-1, model.layers),
    )


def f64(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x: np.ndarray, position: np.ndarray, theta: float) -> np.ndarray:
    """x [k, l, h], pairs (i, i + h/2)."""
    a, b = np.split(x, 2, axis=-1)
    angle = angles(position, x.shape[-1], theta)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def falling(x: np.ndarray) -> np.ndarray:
    """Indices by falling value, the lower index first in a tie."""
    return np.argsort(-x, kind="stable")


def gap(x: np.ndarray, order: np.ndarray, count: int) -> float:
    """Between the last of the first `count` in `order` and the next. Two zeros are masked entries: an exact tie."""
    if not 0 < count < len(order):
        return FAR
    inside, outside = x[order[count - 1]], x[order[count]]
    return FAR if inside == outside == 0 else float(inside - outside)
