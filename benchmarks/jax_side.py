"""The JAX side: the package's own compiled programs, one plan per worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sparsevlm_jax as sv
from benchmarks import jax_programs, weights
from benchmarks.shapes import SHAPES, Cell, Side
from benchmarks.timing import timed
from sparsevlm_jax.attention import exact
from sparsevlm_jax.cost import tower_xla_flops, xla_flops
from sparsevlm_jax.decoding import Decoding, Sampler, decode, start
from sparsevlm_jax.packing import shrink_markers
from sparsevlm_jax.schedule import make_plan

NEEDED_TO_ANSWER = ("start", "decode")


class Program(NamedTuple):
    """A jitted function and what it is called with."""

    function: Any
    args: tuple[Any, ...]
    static: dict[str, Any]

    def compile(self) -> Any:
        return self.function.lower(*self.args, **self.static).compile()


class JaxRunner:
    """Weights, inputs and compiled programs of one side in one cell.

    Args:
      room: new tokens that the cache has room for.
    """

    def __init__(self, cell: Cell, side: Side, room: int) -> None:
        self.cell, self.config, self.room = cell, cell.config, room
        sparsity = side.sparsity(SHAPES[cell.shape], cell.visual_tokens)
        self.plan = make_plan(sparsity, self.config, cell.visual_tokens, cell.text_tokens)
        self.params = jax_programs.draw_params(self.config, cell.dtype)
        self.pixels = jnp.asarray(weights.pixels(cell), cell.dtype)
        rows = list(weights.input_ids(cell))
        if self.plan.grid is not None:
            rows = [shrink_markers(row, self.config, self.plan.grid**2) for row in rows]
        self.ids, self.lengths = jnp.asarray(np.stack(rows)), jnp.full(cell.batch, len(rows[0]))
        self.prefix = int(np.argmax(rows[0] == self.config.image_token_id))
        self.sampler = Sampler(jnp.float32(1.0), jnp.float32(1.0))
        embed = jax.jit(sv.embed, static_argnames=("config", "plan"))
        self.prompt = embed(self.params, self.ids, self.lengths, self.pixels, config=self.config, plan=self.plan)
        self.choices = self._choices()
        self.programs = self._programs()
        self.compiled: dict[str, Any] = {}

    def prepare(self, phases: Sequence[str]) -> None:
        """Compiles what is only timed by itself: what the phases need, or everything."""
        for name in self.programs:
            if name not in NEEDED_TO_ANSWER and (not phases or name in phases):
                self._compile(name)

    def compile(self) -> dict[str, Any]:
        """Compiles what an answer needs.

        Returns:
          Its seconds, cold and warm from the persistent cache; bytes of every compiled program.
        """
        cold = [self._compile(name) for name in NEEDED_TO_ANSWER]
        jax.clear_caches()
        warm = [self._compile(name) for name in NEEDED_TO_ANSWER]
        programs = {name: _program_bytes(program) for name, program in self.compiled.items()}
        return {"cold_s": sum(cold), "warm_s": sum(warm), "program_bytes": programs}

    def program(self, name: str) -> Any:
        """A compiled program."""
        if name not in self.compiled:
            self._compile(name)
        return self.compiled[name]

    def phases(self) -> dict[str, Callable[[], Any]]:
        """What is timed by itself: name -> a call that returns when the device is done."""

        def phase(name: str) -> Callable[[], Any]:
            return lambda: jax.block_until_ready(self.program(name)(*self.programs[name].args))

        return {name: phase(name) for name in self.programs if name not in NEEDED_TO_ANSWER}

    def generate(self, marks: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """Answers greedily: tokens [b, marks[-1]], and the seconds from pixels until so many of them were there."""
        began, seconds = time.perf_counter(), []
        state = self.program("start")(*self.programs["start"].args)
        for mark in marks:
            if mark > 1:
                state = self.program("decode")(self.params, state, jnp.int32(mark), self.sampler)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
        return np.asarray(state.tokens)[:, : marks[-1]], seconds

    def selections(self) -> list[list[list[int]]]:
        """Visual tokens kept at each pruning layer, by row: places among those that stood there."""
        return [[(np.flatnonzero(row) - self.prefix).tolist() for row in kept] for kept, _ in self.choices]

    def forced_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [b, steps + 1, vocab] behind the prompt and behind each of the given tokens [b, steps]."""
        step = jax.jit(partial(sv.decode_step, config=self.config, plan=self.plan), donate_argnums=2)
        logits, cache, _ = self.phases()["prefill"]()
        found = [np.asarray(logits)]
        for column in tokens.T:
            logits, cache = step(self.params, jnp.asarray(column), cache)
            found.append(np.asarray(logits))
        return np.stack(found, axis=1)

    def facts(self) -> dict[str, Any]:
        """What is counted, not timed."""
        decoder = dict(self.params["language_model"])
        decoder.pop("embed_tokens")  # one row of it is read
        cache = jax.eval_shape(*_called(self.programs["prefill"]))[1]
        return {
            "decoder_bytes": _bytes(decoder),
            "cache_bytes": _bytes((cache.keys, cache.values)),
            "xla_flops": self.cell.batch * xla_flops(self.config, self.plan, self.cell.text_tokens),
            "tower_xla_flops": self.cell.batch * self.cell.pictures * tower_xla_flops(self.config, self.plan),
            "device": jax.devices()[0].device_kind,
        }

    def calibrate(self, size: int, buffer_bytes: int) -> dict[str, float]:
        """What this device reaches: FLOP/s of a matrix product in this dtype, bytes per second of reading once.

        What is read is a float32 matrix, times a vector: in 16 bit a CPU is busy with more than reading.
        """
        square = jnp.full((size, size), 0.01, self.cell.dtype)
        tall = jnp.full((buffer_bytes // (4 * size), size), 0.01, jnp.float32)

        def best(left: Any, right: Any) -> float:
            product = jax.jit(partial(jnp.matmul, precision=exact(left.dtype)))
            return min(timed(lambda: jax.block_until_ready(product(left, right)))[1] for _ in range(6))

        return {"flops_per_s": 2 * size**3 / best(square, square), "bytes_per_s": tall.nbytes / best(tall, tall[0])}

    def device_peak_bytes(self) -> int | None:
        """Peak of device memory of this process; None where the backend keeps no count."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _choices(self) -> list[Any]:
        if len(self.plan.stages) == 1:
            return []
        return jax.device_get(jax_programs.choices(self.params, self.prompt, self.config, self.plan))

    def _programs(self) -> dict[str, Program]:
        config, plan, room = self.config, self.plan, self.room
        static = {"config": config, "plan": plan}
        encode = jax.jit(sv.encode_images, static_argnames=("config", "plan"))
        prefill = jax.jit(sv.prefill, static_argnames=("config", "plan", "max_new_tokens"))
        keys = jax.random.split(jax.random.key(0), self.cell.batch)
        question = (self.params, self.ids, self.lengths, self.pixels, keys, self.sampler)
        decoding = Decoding(room, True, ())
        starting = static | {"decoding": decoding}
        going_on = {"config": config, "stops": plan.stops, "decoding": decoding}
        state = jax.eval_shape(partial(start, **starting), *question)
        programs = {
            "tower": Program(encode, (self.params, self.pixels), static),
            "prefill": Program(prefill, (self.params, self.prompt), static | {"max_new_tokens": room}),
            "start": Program(start, question, starting),
            "decode": Program(decode, (self.params, state, jnp.int32(1), self.sampler), going_on),
        }
        if self.choices and plan.sparsity.scale is None:  # v1's counts come from data: nothing to give beforehand
            given = (self.params, self.prompt, self._survivors())
            programs["prefill_given"] = Program(jax_programs.prefill_given, given, static | {"room": room})
        return programs

    def _survivors(self) -> list[Any]:
        visual = (slice(self.prefix, self.prefix + stage.visual) for stage in self.plan.stages)
        return [
            jnp.asarray(jax_programs.survivors(kept, centers, span))
            for (kept, centers), span in zip(self.choices, visual, strict=False)
        ]

    def _compile(self, name: str) -> float:
        self.compiled[name], seconds = timed(self.programs[name].compile)
        return seconds


def _called(program: Program) -> tuple[Any, ...]:
    return partial(program.function, **program.static), *program.args


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _program_bytes(program: Any) -> dict[str, int]:
    """XLA's own account of a compiled program: what is live while it runs, and how much of that is temporary."""
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"peak": held + found.temp_size_in_bytes, "temporary": found.temp_size_in_bytes}
