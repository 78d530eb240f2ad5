"""Attention of the prefill alone: ours for CPUs ("tiled"), XLA's written-out one, and PyTorch's sdpa.

    python -m benchmarks.attention --out benchmarks/results/attention.json

One process per number of threads: XLA's pool is as large as the process's affinity when it starts. Within a process
they take turns, and another begins each round; a ratio is the median of the rounds' own. CPU time stands beside wall
time: with one thread it holds on a machine that others use, too. A floor stands beside ours: the two matrix products
of its blocks with nothing between them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"16 x 64": (16, 64), "32 x 128": (32, 128)}
LENGTHS = (256, 664, 1500, 3000)
SIDES = ("tiled", "products", "xla", "sdpa")
SECONDS = 3.0  # about what a side may take per cell: long ones run fewer rounds, at least 3
TOLERANCE = 5e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write raw samples there")
    parser.add_argument("--rounds", type=int, default=25, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    cells: list[dict[str, Any]] = []
    for threads in options.threads:
        cells += _start(threads, options)
    if options.out:
        from sparsevlm_jax.bench.files import write_json
        from sparsevlm_jax.bench.machine import environment

        result = {"machine": environment("cpu"), "load": os.getloadavg(), "cells": cells}
        write_json(options.out, result)
    print(table(cells))


def table(cells: list[dict[str, Any]]) -> str:
    """Medians in ms of wall time; ratios to sdpa, of wall and of CPU time."""
    from statistics import median

    lines = [
        "| threads | heads | tokens | tiled | its products | xla | sdpa | tiled / sdpa | CPU time | products / sdpa |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        wall, cpu = cell["wall"], cell["cpu"]

        def ratio(samples: dict[str, list[float]], of: str, to: str) -> str:
            return f"{median(a / b for a, b in zip(samples[of], samples[to], strict=True)):.2f}"

        times = [f"{1e3 * median(wall[side]):.1f}" for side in SIDES]
        ratios = [ratio(wall, "tiled", "sdpa"), ratio(cpu, "tiled", "sdpa"), ratio(wall, "products", "sdpa")]
        lines.append(f"| {' | '.join([str(cell['threads']), cell['heads'], str(cell['tokens']), *times, *ratios])} |")
    return "\n".join(lines)


def _start(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.attention", "--worker", str(threads), "--rounds", str(options.rounds)]
    command += ["--lengths", *map(str, options.lengths), "--shapes", *options.shapes]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    return json.loads(found.stdout)


def _work(options: argparse.Namespace) -> None:
    """Measures every cell on so many cores and writes them to stdout."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < options.worker:
        raise SystemExit(f"--threads {options.worker}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[-options.worker :])  # before XLA counts them
    cells = []
    for heads in options.shapes:
        for tokens in options.lengths:
            cells.append(_cell(options.worker, heads, tokens, options.rounds))
            print(table(cells[-1:]).splitlines()[-1], file=sys.stderr)
    json.dump(cells, sys.stdout)


def _cell(threads: int, heads: str, tokens: int, rounds: int) -> dict[str, Any]:
    import numpy as np

    sides = _sides(threads, *SHAPES[heads], tokens)
    expected = sides["xla"]()  # the first calls: XLA's compile
    for side in ("tiled", "sdpa"):
        np.testing.assert_allclose(sides[side](), expected, atol=TOLERANCE, rtol=0)
    began = time.perf_counter()
    for run in sides.values():
        run()
    rounds = min(rounds, max(3, round(len(SIDES) * SECONDS / (time.perf_counter() - began))))
    wall, cpu = ({side: [] for side in SIDES} for _ in range(2))
    for turn in range(rounds):
        for at in range(len(SIDES)):
            side = SIDES[(turn + at) % len(SIDES)]
            clocks = time.perf_counter(), time.process_time()
            sides[side]()
            wall[side].append(time.perf_counter() - clocks[0])
            cpu[side].append(time.process_time() - clocks[1])
    return {"threads": threads, "heads": heads, "tokens": tokens, "wall": wall, "cpu": cpu}


def _sides(threads: int, heads: int, head_dim: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Calls that return [1, l, n, h]. PyTorch gets what its models give sdpa: heads before tokens, as a view."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from sparsevlm_jax.ops.attention import attend

    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((1, tokens, heads, head_dim), np.float32) for _ in range(3)]
    ours = [jnp.asarray(x) for x in arrays]
    lengths = jnp.full(1, tokens, jnp.int32)
    theirs = [torch.from_numpy(x).transpose(1, 2) for x in arrays]

    def jax_side(implementation: str) -> Callable[[], Any]:
        run = jax.jit(partial(attend, causal=True, implementation=implementation))
        return lambda: run(*ours, lengths).block_until_ready()

    @torch.inference_mode()
    def sdpa() -> Any:
        query, key, value = theirs
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2)

    products, by_head = _products(heads, head_dim, tokens), [jnp.swapaxes(x[0], 0, 1) for x in ours]
    return {
        "tiled": jax_side("tiled"),
        "products": lambda: products(*by_head).block_until_ready(),
        "xla": jax_side("xla"),
        "sdpa": sdpa,
    }


def _products(heads: int, head_dim: int, tokens: int) -> Callable[..., Any]:
    """Of [n, l, h]: the products of the tiled path's blocks, the second of what the first gives."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from sparsevlm_jax.ops.attention import heads_at_a_time, rows_at_a_time

    rows = rows_at_a_time(tokens)
    _, together = heads_at_a_time(1, heads, bytes_each=4 * rows * tokens)
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def run(*arrays: jax.Array) -> jax.Array:
        def turn(number: jax.Array, out: jax.Array) -> jax.Array:
            place, size = (number * together, 0, 0), (together, tokens, head_dim)
            query, key, value = (jax.lax.dynamic_slice(x, place, size) for x in arrays)
            made = []
            for start in range(0, tokens, rows):
                stop = min(start + rows, tokens)
                logits = product("nqh,nth->nqt", query[:, start:stop], key[:, :stop])
                made.append(product("nqt,nth->nqh", jax.lax.optimization_barrier(logits), value[:, :stop]))
            return jax.lax.dynamic_update_slice(out, jnp.concatenate(made, axis=1), place)

        return jax.lax.fori_loop(0, heads // together, turn, jnp.zeros_like(arrays[0]))

    return jax.jit(run)


if __name__ == "__main__":
    main()
