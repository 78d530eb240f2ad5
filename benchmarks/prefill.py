"""Dense against pruned, on one machine in one run: prefill, decoding, end to end, cache and temporary memory.

    python benchmarks/prefill.py --out benchmarks/results/prefill_cpu.json

The model has LLaVA-1.5's token layout (576 visual tokens, 32 layers) at a width that the machine can hold, and random
weights: what is timed depends on shapes only. Methods take turns within every round, so that a machine whose speed
drifts slows all of them; ratios are per round. Compile time is apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import sparsevlm_jax as sv
from sparsevlm_jax.cost import cost

PREFIX = 35  # tokens in front of the picture in LLaVA-1.5's prompt


def main() -> None:
    args = parse()
    config = model(args)
    dtype = jnp.dtype(args.dtype)
    params = sv.init_params(config, jax.random.key(0), dtype)
    prompt = make_prompt(config, args, dtype)
    plans = {name: plan_of(name, config, args) for name in args.methods}
    programs = {name: compile_for(params, prompt, config, plan, args) for name, plan in plans.items()}
    samples: dict[str, dict[str, list[float]]] = {
        name: {"prefill_s": [], "decode_s": [], "total_s": []} for name in plans
    }
    for round_ in range(args.rounds + 1):
        for name, program in programs.items():
            prefill_s, decode_s = run(program, params, prompt, args)
            if round_:  # the first round warms up
                for key, value in (("prefill_s", prefill_s), ("decode_s", decode_s), ("total_s", prefill_s + decode_s)):
                    samples[name][key].append(value)
    report = {
        "environment": environment(),
        "settings": vars(args) | {"out": str(args.out)},
        "results": {
            name: summary(config, plans[name], programs[name], samples[name], samples["dense"], args) for name in plans
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in report["results"].items():
        print(
            f"{name:14} prefill {result['prefill_s']['p50']:.3f} s (x{result['prefill_speedup']:.2f})  "
            f"end to end x{result['total_speedup']:.2f}  temporaries {result['temp_mib']:.0f} MiB  "
            f"cache {result['cache_mib']:.1f} MiB  compile {result['compile_s']:.1f} s"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["dense", "v1.5", "v2.0", "random", "fastv", "vision"])
    parser.add_argument("--keep", type=int, default=192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=118)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--preset", help="llava-1.5-7b or -13b; default: 32 layers of --width")
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    if args.methods[0] != "dense":
        parser.error("--methods must begin with dense, which the others are compared with")
    return args


def model(args: argparse.Namespace) -> sv.LlavaConfig:
    if args.preset:
        return sv.PRESETS[args.preset]()
    full = sv.llava_15_7b()
    text = replace(
        full.text,
        hidden_size=args.width,
        intermediate_size=args.width * full.text.intermediate_size // full.text.hidden_size,
        num_attention_heads=args.width // 48,
        num_key_value_heads=args.width // 48,
        head_dim=48,
        vocab_size=4096,
    )
    vision = replace(full.vision, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    return replace(full, text=text, vision=vision, image_token_id=4000)


def make_prompt(config: sv.LlavaConfig, args: argparse.Namespace, dtype: jnp.dtype) -> sv.Prompt:
    visual = config.tokens_per_image
    length = visual + args.text_tokens
    embeddings = jax.random.normal(jax.random.key(1), (args.batch, length, config.text.hidden_size)).astype(dtype)
    places = jnp.broadcast_to(jnp.arange(length)[None], (args.batch, length))
    return sv.Prompt(
        embeddings,
        (places >= PREFIX) & (places < PREFIX + visual),
        jnp.full(args.batch, length),
        jax.random.uniform(jax.random.key(2), (args.batch, length)),
    )


def plan_of(name: str, config: sv.LlavaConfig, args: argparse.Namespace) -> sv.Plan:
    keep = None if name == "dense" else args.keep
    return sv.make_plan(sv.sparsity(name, keep=keep), config, config.tokens_per_image, args.text_tokens)


def compile_for(
    params: Any, prompt: sv.Prompt, config: sv.LlavaConfig, plan: sv.Plan, args: argparse.Namespace
) -> dict[str, Any]:
    """Prefill and a loop of decoding steps, compiled ahead of time."""
    prefill = jax.jit(partial(sv.prefill, config=config, plan=plan, max_new_tokens=args.new_tokens))

    def decode(params: Any, logits: Any, cache: sv.Cache) -> Any:
        def step(_: Any, carry: tuple[Any, sv.Cache]) -> tuple[Any, sv.Cache]:
            token = jnp.argmax(carry[0], axis=-1).astype(jnp.int32)
            return sv.decode_step(params, token, carry[1], config, plan)

        return jax.lax.fori_loop(0, args.new_tokens, step, (logits, cache))

    began = time.perf_counter()
    compiled = prefill.lower(params, prompt).compile()
    logits, cache, _ = jax.eval_shape(prefill, params, prompt)
    decoding = jax.jit(decode, donate_argnums=(2,)).lower(params, logits, cache).compile()
    return {"prefill": compiled, "decode": decoding, "compile_s": time.perf_counter() - began}


def run(program: dict[str, Any], params: Any, prompt: sv.Prompt, args: argparse.Namespace) -> tuple[float, float]:
    began = time.perf_counter()
    logits, cache, _ = jax.block_until_ready(program["prefill"](params, prompt))
    middle = time.perf_counter()
    jax.block_until_ready(program["decode"](params, logits, cache))
    return middle - began, time.perf_counter() - middle


def summary(
    config: sv.LlavaConfig, plan: sv.Plan, program: dict[str, Any], samples: Any, dense: Any, args: argparse.Namespace
) -> dict[str, Any]:
    counted = cost(config, plan, args.text_tokens)
    itemsize = jnp.dtype(args.dtype).itemsize

    def speedup(key: str) -> float:
        return statistics.median(d / s for d, s in zip(dense[key], samples[key], strict=True))

    return {
        **{k: {"p50": statistics.median(v), "min": min(v), "max": max(v), "samples": v} for k, v in samples.items()},
        "prefill_speedup": speedup("prefill_s"),
        "decode_speedup": speedup("decode_s"),
        "total_speedup": speedup("total_s"),
        "compile_s": program["compile_s"],
        "temp_mib": program["prefill"].memory_analysis().temp_size_in_bytes / 2**20,
        "cache_mib": args.batch * counted.cache_bytes * itemsize / 2 / 2**20,
        "equivalent_tokens": plan.equivalent_tokens(),
        "entering_tokens": plan.entering_tokens(),
        "paper_flops": counted.paper_flops,
        "xla_flops": counted.xla_flops,
    }


def environment() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
