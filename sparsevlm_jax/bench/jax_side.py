"""The JAX side: the package's own compiled programs, one plan per worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sparsevlm_jax.bench import hash_weights, jax_programs
from sparsevlm_jax.bench.metrics import layer_lengths, plan_of
from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.bench.timing import timed
from sparsevlm_jax.generation.loop import LoopConfig, SamplingParams, decode, shapes_of_state, start
from sparsevlm_jax.inputs.packing import TiledImages, shrink_markers
from sparsevlm_jax.models import stages
from sparsevlm_jax.models.cost import frame_xla_flops, tower_xla_flops, xla_flops
from sparsevlm_jax.models.embedding import embed, encode_images
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.models.parameters import tree_bytes
from sparsevlm_jax.models.stages import Prompt
from sparsevlm_jax.ops.attention import exact
from sparsevlm_jax.parallel.arrays import mesh_of, on_mesh_of, put_beside, require_rows
from sparsevlm_jax.parallel.inside import BY_HEAD
from sparsevlm_jax.parallel.rules import WHOLE
from sparsevlm_jax.pruning.methods import METHODS

NEEDED_TO_ANSWER = ("start", "decode")


class Program(NamedTuple):
    """A jitted function and what it is called with."""

    function: Any
    args: tuple[Any, ...]
    static: dict[str, Any]

    def compile(self) -> Any:
        with on_mesh_of(self.args[0]):  # the parameters
            return self.function.lower(*self.args, **self.static).compile()


class JaxRunner:
    """Weights, inputs and compiled programs of one side in one cell.

    Args:
      room: new tokens that the cache has room for.
    """

    def __init__(self, cell: Cell, side: Side, room: int) -> None:
        self.cell, self.config, self.room = cell, cell.config, room
        self.plan = plan_of(cell, side)
        self.layer_lengths = layer_lengths(cell, self.plan)
        self.params = jax_programs.draw_params(self.config, cell.dtype, side.mesh, side.quantize)
        self.mesh = mesh_of(self.params)
        require_rows(self.params, cell.batch)
        self.images = self._put(_on_device(hash_weights.images(cell), cell.dtype))
        rows = list(hash_weights.input_ids(cell))
        if self.plan.grid is not None:
            markers = self.config.image_token_id, self.config.tokens_per_image
            rows = [shrink_markers(row, *markers, self.plan.grid**2) for row in rows]
        self.ids, self.lengths = self._put((jnp.asarray(np.stack(rows)), jnp.full(cell.batch, len(rows[0]))))
        self.prefix = int(np.argmax(rows[0] == self.config.image_token_id))
        self.sampler = self._put(SamplingParams(jnp.float32(1.0), jnp.float32(1.0)))
        self.compiled: dict[str, Any] = {}

    def prepare(self, phases: Sequence[str]) -> None:
        """Compiles what is only timed by itself: what the phases need, or everything."""
        for name in self._phases():
            if not phases or name in phases:
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
            return lambda: jax.block_until_ready(self.program(name)(*self.describe(name).args))

        return {name: phase(name) for name in self._phases()}

    def generate(self, marks: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """Answers greedily: tokens [b, marks[-1]], and the seconds from pixels until so many of them were there."""
        began, seconds = time.perf_counter(), []
        state = self.program("start")(*self.programs["start"].args)
        for mark in marks:
            if mark > 1:
                state = self.program("decode")(self.params, state, self._put(jnp.int32(mark)), self.sampler)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
        return np.asarray(state.tokens)[:, : marks[-1]], seconds

    def selections(self) -> list[list[list[int]]]:
        """Visual tokens kept at each pruning layer, by row: places among those that stood there."""
        return [[(np.flatnonzero(row) - self.prefix).tolist() for row in kept] for kept, _ in self.choices]

    @cached_property
    def choices(self) -> list[Any]:
        """What the prefill chooses, on the host: see `jax_programs.recorded_prefill`."""
        return jax.device_get(self._recorded(0)[2]) if len(self.plan.stages) > 1 else []

    def follow(self, steps: int, tokens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Decodes along given tokens [b, steps], or along the likeliest ones.

        Returns:
          The tokens, and logits [b, steps + 1, vocab] behind the prompt and behind each token.
        """
        step = jax.jit(partial(stages.decode_step, config=self.config, plan=self.plan), donate_argnums=2)
        logits, cache, choices = self._recorded(self.room)
        self.choices = jax.device_get(choices)
        found, followed = [np.asarray(logits)], []
        for number in range(steps):
            column = found[-1].argmax(axis=-1) if tokens is None else tokens[:, number]
            with on_mesh_of(self.params):
                logits, cache = step(self.params, jnp.asarray(column, jnp.int32), cache)
            followed.append(column)
            found.append(np.asarray(logits))
        return np.stack(followed, axis=1), np.stack(found, axis=1)

    def facts(self) -> dict[str, Any]:
        """What is counted, not timed."""
        decoder = dict(self.params[DECODER])
        decoder.pop("embed_tokens")  # one row of it is read
        cache = jax.eval_shape(*_called(self.programs["prefill"]))[1]
        return {
            "decoder_bytes": tree_bytes(decoder),
            "cache_bytes": tree_bytes((cache.keys, cache.values)),
            "xla_flops": self.cell.batch * xla_flops(self.config, self.plan, self.cell.text_tokens),
            "tower_xla_flops": self.cell.batch * self.cell.images * self._tower_flops(),
            "device": jax.devices()[0].device_kind,
        }

    def _tower_flops(self) -> float:
        """Of an image or a frame."""
        return frame_xla_flops(self.config) if self.cell.video else tower_xla_flops(self.config, self.plan)

    def calibrate(self, size: int, buffer_bytes: int) -> dict[str, float]:
        """What the devices reach, all as one does: FLOP/s of a matrix product in this dtype, and bytes per second of
        reading once.

        What is read is a float32 matrix, times a vector: in 16 bit a CPU is busy with more than reading.
        """
        square = jnp.full((size, size), 0.01, self.cell.dtype)
        tall = jnp.full((buffer_bytes // (4 * size), size), 0.01, jnp.float32)

        def best(left: Any, right: Any) -> float:
            product = jax.jit(partial(jnp.matmul, precision=exact(left.dtype)))
            return min(timed(lambda: jax.block_until_ready(product(left, right)))[1] for _ in range(6))

        devices = 1 if self.mesh is None else self.mesh.size
        found = {"flops_per_s": 2 * size**3 / best(square, square), "bytes_per_s": tall.nbytes / best(tall, tall[0])}
        return {name: devices * value for name, value in found.items()}

    def device_peak_bytes(self) -> int | None:
        """Peak of device memory of this process; None where the backend keeps no count."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _recorded(self, room: int) -> Any:
        prompt = self.prompt
        with on_mesh_of(self.params):
            return jax_programs.recorded_prefill(self.params, prompt, config=self.config, plan=self.plan, room=room)

    def _put(self, tree: Any) -> Any:
        return tree if self.mesh is None else put_beside(self.params, tree)

    def _phases(self) -> list[str]:
        """What is timed by itself. Where data decides the counts there is nothing to give beforehand."""
        given = ["prefill_given"] * (
            len(self.plan.stages) > 1 and not METHODS[self.plan.sparsity.method].counts_are_bounds
        )
        return [name for name in self.programs if name not in (*NEEDED_TO_ANSWER, *given)] + given

    def describe(self, name: str) -> Program:
        """A program and its arguments. What the prefill is given to choose is found when it is first asked for."""
        if name not in self.programs:
            assert name == "prefill_given"
            given = (self.params, self.prompt, self._survivors())
            static = {"config": self.config, "plan": self.plan, "room": self.room}
            self.programs[name] = Program(jax_programs.prefill_given, given, static)
        return self.programs[name]

    @cached_property
    def prompt(self) -> Prompt:
        """The rows' embeddings. Compiled when first asked for: while workers start, others may be busy."""
        program = jax.jit(embed, static_argnames=("config", "plan"))
        with on_mesh_of(self.params):
            return program(self.params, self.ids, self.lengths, self.images, config=self.config, plan=self.plan)

    @cached_property
    def programs(self) -> dict[str, Program]:
        """What can be run, by name; see `describe`."""
        config, plan, room = self.config, self.plan, self.room
        static = {"config": config, "plan": plan}
        encode = jax.jit(encode_images, static_argnames=("config", "plan"))
        prefill = jax.jit(stages.prefill, static_argnames=("config", "plan", "max_new_tokens"))
        keys = self._put(jax.random.split(jax.random.key(0), self.cell.batch))
        question = (self.params, self.ids, self.lengths, self.images, keys, self.sampler)
        decoding = LoopConfig(room, True, ())
        starting = static | {"decoding": decoding}
        going_on = {"config": config, "stops": plan.stops, "decoding": decoding}
        state: Any = jax.eval_shape(partial(start, **starting), *question)
        if self.mesh is not None:
            state = shapes_of_state(state, NamedSharding(self.mesh, WHOLE), NamedSharding(self.mesh, BY_HEAD))
        return {
            "tower": Program(encode, (self.params, self.images), static),
            "prefill": Program(prefill, (self.params, self.prompt), static | {"max_new_tokens": room}),
            "products": Program(
                jax_programs.products, (self.params, self.prompt.embeddings), {"lengths": self.layer_lengths}
            ),
            "start": Program(start, question, starting),
            "decode": Program(decode, (self.params, state, self._put(jnp.int32(1)), self.sampler), going_on),
        }

    def _survivors(self) -> list[Any]:
        visual = (slice(self.prefix, self.prefix + stage.visual) for stage in self.plan.stages)
        return [
            self._put(jnp.asarray(jax_programs.survivors(kept, centers, span)))
            for (kept, centers), span in zip(self.choices, visual, strict=False)
        ]

    def _compile(self, name: str) -> float:
        self.compiled[name], seconds = timed(self.describe(name).compile)
        return seconds


def _on_device(images: np.ndarray | TiledImages, dtype: str) -> Any:
    if isinstance(images, TiledImages):
        packing = jax.tree.map(jnp.asarray, images.packing)
        frames = None if images.frames is None else jnp.asarray(images.frames, dtype)
        return TiledImages(jnp.asarray(images.pixel_values, dtype), packing, frames)
    return jnp.asarray(images, dtype)


def _called(program: Program) -> tuple[Any, ...]:
    return partial(program.function, **program.static), *program.args


def _program_bytes(program: Any) -> dict[str, int]:
    """XLA's own account of a compiled program: what is live while it runs, and how much of that is temporary."""
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"peak": held + found.temp_size_in_bytes, "temporary": found.temp_size_in_bytes}
