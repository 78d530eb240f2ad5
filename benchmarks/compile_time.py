"""CPU seconds of compiling a prefill, cold: dense, a cut that only gathers, v1.5; of this tree and of an earlier one.

    git worktree add /tmp/before 7861f50
    python -m benchmarks.compile_time --before /tmp/before --out benchmarks/results/compile_time.json

Each program is traced, lowered and compiled in a process of its own, decoder only, for this machine's CPU; sides and
trees take turns. CPU seconds, as compiling uses several cores, and what others do on the machine changes them least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from sparsevlm_jax.bench.files import write_json
from sparsevlm_jax.bench.machine import environment

SIDES = ("jax:dense", "jax:uniform@192", "jax:v1.5@192")
SHAPES = ("small", "llava-1.5-7b")
HERE = Path(__file__).resolve().parent.parent

# Runs in either tree: names of the earlier one are those of its time.
ONE = """
import json, resource, sys, time
import jax
import jax.numpy as jnp
try:
    from sparsevlm_jax.bench.shapes import SHAPES, Side
    from sparsevlm_jax.models.parameters import abstract_params
    from sparsevlm_jax.models.stages import Prompt, prefill
    from sparsevlm_jax.pruning.budgets import make_plan
except ImportError:
    from benchmarks.shapes import SHAPES, Side
    from sparsevlm_jax.llava import Prompt, abstract_params, prefill
    from sparsevlm_jax.schedule import make_plan

jax.config.update("jax_enable_compilation_cache", False)
jax.jit(lambda x: x + 1).lower(1.0).compile()  # what starts once


def now():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


shape, side = SHAPES[sys.argv[1]], sys.argv[2]
visual, text, config = shape.visual_tokens, shape.text_tokens, shape.config
plan = make_plan(Side.parse(side, visual).sparsity(shape, visual), config, visual, text)
length, dtype = visual + text, jnp.float32 if sys.argv[1] == "small" else jnp.bfloat16
prompt = Prompt(
    embeddings=jax.ShapeDtypeStruct((1, length, config.text.hidden_size), dtype),
    visual=jax.ShapeDtypeStruct((1, length), bool),
    lengths=jax.ShapeDtypeStruct((1,), jnp.int32),
    saliency=jax.ShapeDtypeStruct((1, length), jnp.float32),
)
began = now()
program = jax.jit(lambda params, prompt: prefill(params, prompt, config, plan, max_new_tokens=128)[:2])
lowered = program.lower(abstract_params(config, dtype), prompt)
between = now()
lowered.compile()
print(json.dumps({"lower": between - began, "compile": now() - between, "points": len(plan.stages) - 1}))
"""


def one(tree: Path, shape: str, side: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ONE, shape, side]
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def per_point(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians: seconds of every side, and what v1.5 takes more than dense by pruning layer."""
    seconds = {side: median(run["lower"] + run["compile"] for run in found) for side, found in runs.items()}
    more = seconds["jax:v1.5@192"] - seconds["jax:dense"]
    return {**seconds, "a pruning point": more / runs["jax:v1.5@192"][0]["points"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write raw samples there")
    options = parser.parse_args()
    trees = {"now": HERE} | ({"before": options.before.resolve()} if options.before else {})
    runs: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for _ in range(options.rounds):
        for shape in options.shapes:
            for side in SIDES:
                for name, tree in trees.items():
                    found = one(tree, shape, side)
                    runs.setdefault(shape, {}).setdefault(name, {}).setdefault(side, []).append(found)
                    print(shape, name, side, found, file=sys.stderr, flush=True)
    summary = {shape: {name: per_point(found) for name, found in named.items()} for shape, named in runs.items()}
    print(json.dumps(summary, indent=1))
    if options.out:
        commits = {name: _commit(tree) for name, tree in trees.items()}
        where = {"environment": environment("cpu"), "commits": commits}
        write_json(options.out, {**where, "summary": summary, "runs": runs})


def _commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
