"""Reads recorded traces of the authors' code (tests/golden/README.md) and replays them here."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsevlm_jax import Plan, Prompt, Sparsity, decode_step, make_plan, prefill
from sparsevlm_jax.models.llava import Llava, LlavaConfig
from sparsevlm_jax.models.presets import tiny
from sparsevlm_jax.rotary import plain_rope

SPARSITIES = {
    "dense": lambda c: Sparsity.dense(),
    "v15": lambda c: Sparsity.v15(keep_at=_keep_at(c)),
    "v1": lambda c: Sparsity.v1(scale=c["scale"], bias=c["bias"]).changed(layers=tuple(c["pruning_layers"])),
    "v20": lambda c: Sparsity.v20(keep_at=_keep_at(c), heads=c["n_selected_heads"] or 14),
}


class Case(NamedTuple):
    path: Path
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def visual(self) -> slice:
        return slice(self.settings["v_start"], self.settings["v_start"] + self.settings["v_num"])


class Replay(NamedTuple):
    """What this package computes for a case, batch of one, as NumPy."""

    plan: Plan
    trace: Any
    prefill_lengths: np.ndarray  # per layer
    final_lengths: np.ndarray
    decode_positions: np.ndarray  # [steps, layers]
    step_logits: np.ndarray
    final_hidden: np.ndarray  # after the final norm


def files(folder: Path) -> list[Path]:
    """All .npz of a folder that are not weights."""
    return sorted(p for p in folder.glob("*.npz") if not p.name.startswith("weights_"))


def kind(path: Path) -> str:
    """What a file records, told from its contents: "raters", "cluster", "scores", "rope", "dense_llava" or "lm"."""
    config = settings(path)
    if isinstance(config, list):
        keys = config[0].keys()
        return "scores" if "fn" in keys else "cluster" if "cluster_num" in keys else "raters"
    if "version" in config:
        return "lm"
    return "dense_llava" if "cases" in config else "rope"


def settings(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as z:
        return json.loads(str(z["config_json"]))


@cache
def read(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as z:
        arrays = {key: z[key] for key in z.files if key != "config_json"}
        return Case(path, json.loads(str(z["config_json"])), arrays)


@cache
def replay(path: Path) -> Replay:
    """Prefill and the recorded tokens, decoded one by one (teacher-forced with the recorded ids)."""
    case = read(path)
    config, params = model(case)
    arrays, sizes = case.arrays, case.settings
    plan = make_plan(sparsity(sizes), config, sizes["v_num"], sizes["L"] - sizes["v_num"])
    visual = np.zeros((1, sizes["L"]), bool)
    visual[:, case.visual] = True
    prompt = Prompt(jnp.asarray(arrays["inputs_embeds"]), jnp.asarray(visual), jnp.asarray([sizes["L"]]))
    tokens = arrays["tokens"]
    run = jax.jit(
        partial(prefill, config=config, plan=plan, trace=True, max_new_tokens=len(tokens)),
    )
    step = jax.jit(partial(decode_step, config=config, plan=plan))
    logits, cache_, trace = run(params, prompt, jitter=jitter(case))
    lengths, positions, all_logits = [cache_.lengths], [], [logits]
    for token in tokens[:-1]:
        positions.append(cache_.positions)
        logits, cache_ = step(params, jnp.asarray([token]), cache_)
        all_logits.append(logits)
    lengths.append(cache_.lengths)
    layer_stage = [i for i, stage in enumerate(plan.stages) for _ in range(stage.start, stage.stop)]
    final = Llava(config).apply({"params": params}, trace.hidden, method=lambda m, x: m.language_model.norm(x))
    return Replay(
        plan,
        jax.tree.map(np.asarray, trace),
        np.asarray(lengths[0])[layer_stage, 0],
        np.asarray(lengths[1])[layer_stage, 0],
        np.stack([np.asarray(p)[layer_stage, 0] for p in positions]),
        np.concatenate([np.asarray(x) for x in all_logits]),
        np.asarray(final)[0],
    )


def sparsity(sizes: dict[str, Any]) -> Sparsity:
    version = sizes["version"]
    if version not in SPARSITIES:
        raise ValueError(f'{sizes["case"]}: unknown version "{version}"')
    return SPARSITIES[version](sizes)


def model(case: Case) -> tuple[LlavaConfig, dict[str, Any]]:
    """The decoder of a case: its geometry as the file says, its weights from the file that it names."""
    if case.path.name.startswith("tiny_llava"):
        return tiny_llava(case.path.parent)
    m = case.settings["model"]
    base = tiny()
    text = replace(
        base.text,
        vocab_size=m["vocab"],
        hidden_size=m["hidden"],
        intermediate_size=m["inter"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        head_dim=m["head_dim"],
        hidden_act=m.get("hidden_act", "silu"),
        rms_norm_eps=m["rms_norm_eps"],
        rope=plain_rope(m["head_dim"], m["rope_theta"]),
        tie_word_embeddings=m.get("tie_word_embeddings", False),
    )
    config = replace(base, text=text)
    return config, decoder_params(case.path.parent / case.settings["weights"])


@cache
def decoder_params(path: Path) -> dict[str, Any]:
    """A weights file under Hugging Face LlamaForCausalLM names."""
    params: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as z:
        for name in z.files:
            if name == "config_json":
                continue
            value = z[name]
            parts = name.removeprefix("model.").replace("layers.", "layers_").removesuffix(".weight").split(".")
            if parts[-1] == "embed_tokens":
                leaf = "embedding"
            elif value.ndim == 1:
                leaf = "scale"
            else:
                leaf = "weight"
            node = params
            for part in parts:
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(value)
    return {"language_model": params}


@cache
def tiny_llava(folder: Path) -> tuple[LlavaConfig, dict[str, Any]]:
    from sparsevlm_jax.checkpoints.load import load

    loaded = load(folder / "tiny_llava_hf")
    assert isinstance(loaded.config, LlavaConfig)
    return loaded.config, loaded.params


def jitter(case: Case) -> tuple[jnp.ndarray, ...]:
    """Recorded density noise of every pruning layer, by token of the sequence; zeros where none was recorded."""
    noise = []
    for k, event in enumerate(case.settings["events"]):
        per_token = np.zeros((1, event["seq_len_in"]), np.float32)
        recorded = case.arrays.get(f"p{k}_noise_u")
        if recorded is not None:
            per_token[0, event["v_start"] + case.arrays[f"p{k}_merge_vis"]] = recorded
        noise.append(jnp.asarray(per_token))
    return tuple(noise)


def _keep_at(sizes: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes["pruning_layers"], sizes["budgets"], strict=True))
