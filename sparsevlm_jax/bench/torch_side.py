"""The PyTorch sides: transformers' LLaVA as it is (eager, sdpa, torch.compile), and SparseVLM on its modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from sparsevlm_jax.bench import hash_weights
from sparsevlm_jax.bench.metrics import layer_lengths, plan_of
from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.bench.timing import cores, timed
from sparsevlm_jax.bench.torch_sparsevlm import Event, Span, SparseDecoder, State
from sparsevlm_jax.bench.torch_weights import load

WRITTEN_OUT = {"eager": "eager", "faithful": "eager"}  # engines whose towers, too, write their attention out


class TorchRunner:
    """Weights and inputs of one side in one cell. Subclasses say how the decoder runs.

    Args:
      room: new tokens that a cache of fixed size has room for.
    """

    def __init__(self, cell: Cell, side: Side, room: int, device: str) -> None:
        torch.set_num_threads(cores())
        self.cell, self.side, self.room = cell, side, room
        self.plan = plan_of(cell, side)
        self.layer_lengths = layer_lengths(cell, self.plan)
        self.device = torch.device("cuda" if device == "gpu" else device)
        self.model = load(cell.config, cell.dtype, self.device, WRITTEN_OUT.get(side.engine, "sdpa"))
        dtype = self.model.dtype
        self.pixels = torch.from_numpy(hash_weights.pixels(cell)).to(self.device, dtype)
        self.sizes: dict[str, Tensor] = {}  # of the images, where their layout follows from them
        if cell.video:
            self.pixels = self.pixels.unflatten(0, (cell.batch, cell.images))
        elif cell.config.most_tiles > 1:
            self.pixels = self.pixels.unflatten(0, (-1, cell.config.most_tiles))
            self.sizes = {"image_sizes": torch.tensor([cell.image_size] * len(self.pixels), device=self.device)}
        self.ids = torch.from_numpy(hash_weights.input_ids(cell)).to(self.device, torch.long)
        self.set_up()
        with torch.inference_mode():
            self.embeddings = self.embed(self.encode())

    def set_up(self) -> None:
        """What a subclass needs besides the model."""

    def prefill(self, embeddings: Tensor) -> tuple[Tensor, Any]:
        """Input embeddings [b, l, d] to logits of the next token [b, vocab] and the state to decode from."""
        raise NotImplementedError

    def step(self, token: Tensor, state: Any) -> Tensor:
        """Ids [b] to logits [b, vocab]; the state goes on."""
        raise NotImplementedError

    def prepare(self, phases: Sequence[str]) -> None:
        """As `JaxRunner.prepare`: nothing here."""

    def compile(self) -> dict[str, Any]:
        """Nothing to compile: the first call is as slow as the second."""
        return {"cold_s": 0.0, "warm_s": 0.0, "program_bytes": {}}

    def encode(self) -> Tensor:
        """Vision tower and projector: [images or frames, v, d]."""
        config, model = self.model.config, self.model.model
        if self.cell.video:
            return model.get_video_features(self.pixels, vision_feature_layer=config.vision_feature_layer).pooler_output
        found = model.get_image_features(
            self.pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            **self.sizes,
        )
        return torch.stack(list(found.pooler_output))

    def embed(self, features: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()(self.ids)
        image = (self.ids == self.model.config.image_token_id)[..., None]
        return words.masked_scatter(image, features.to(words.dtype))

    @torch.inference_mode()
    def generate(self, marks: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """As `JaxRunner.generate`."""
        began, seconds, tokens = time.perf_counter(), [], []
        logits, state = self.prefill(self.embed(self.encode()))
        for count in range(1, marks[-1] + 1):
            if tokens:
                logits = self.step(tokens[-1], state)
            tokens.append(logits.argmax(dim=-1))
            if count in marks:
                self._wait()
                seconds.append(time.perf_counter() - began)
        return torch.stack(tokens, dim=1).cpu().numpy(), seconds

    def phases(self) -> dict[str, Callable[[], Any]]:
        """As `JaxRunner.phases`."""

        def phase(run: Callable[[], Any]) -> Callable[[], Any]:
            def waited() -> None:
                with torch.inference_mode():
                    run()
                self._wait()

            return waited

        return {
            "tower": phase(self.encode),
            "prefill": phase(lambda: self.prefill(self.embeddings)),
            "products": phase(self.products),
        }

    def products(self) -> None:
        """As `jax_programs.products`."""
        hidden = self.embeddings
        for layer, length in zip(self.model.model.language_model.layers, self.layer_lengths, strict=True):
            hidden = hidden[:, :length]
            for part in ("k_proj", "v_proj"):
                getattr(layer.self_attn, part)(hidden)
            layer.self_attn.o_proj(layer.self_attn.q_proj(hidden))
            layer.mlp.up_proj(hidden)
            hidden = layer.mlp.down_proj(layer.mlp.gate_proj(hidden))

    def selections(self) -> list[list[list[int]]]:
        """As `JaxRunner.selections`."""
        return []

    @torch.inference_mode()
    def follow(self, steps: int, tokens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `JaxRunner.follow`."""
        logits, state = self.prefill(self.embeddings)
        found, followed = [logits.cpu()], []
        for number in range(steps):
            column = logits.argmax(dim=-1) if tokens is None else torch.tensor(tokens[:, number], device=self.device)
            logits = self.step(column, state)
            followed.append(column.cpu())
            found.append(logits.cpu())
        return torch.stack(followed, dim=1).numpy(), torch.stack(found, dim=1).numpy()

    @torch.inference_mode()
    def facts(self) -> dict[str, Any]:
        """What is counted, not timed."""
        decoder = [*self.model.model.language_model.layers.parameters(), *self.model.lm_head.parameters()]
        return {
            "decoder_bytes": sum(p.numel() * p.element_size() for p in decoder),
            "cache_bytes": self.cache_bytes(self.prefill(self.embeddings)[1]),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
        }

    def cache_bytes(self, state: Any) -> int:
        """Of keys and values behind the prompt, as they are held."""
        return sum(t.numel() * t.element_size() for layer in state.layers for t in (layer.keys, layer.values))

    @torch.inference_mode()
    def calibrate(self, size: int, buffer_bytes: int) -> dict[str, float]:
        """As `JaxRunner.calibrate`."""
        square = torch.full((size, size), 0.01, dtype=self.model.dtype, device=self.device)
        tall = torch.full((buffer_bytes // (4 * size), size), 0.01, device=self.device)

        def best(left: Tensor, right: Tensor) -> float:
            return min(timed(lambda: (left @ right, self._wait()))[1] for _ in range(6))

        return {"flops_per_s": 2 * size**3 / best(square, square), "bytes_per_s": tall.nbytes / best(tall, tall[0])}

    def device_peak_bytes(self) -> int | None:
        """As `JaxRunner.device_peak_bytes`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Dense(TorchRunner):
    """transformers' own decoder."""

    def prefill(self, embeddings: Tensor) -> tuple[Tensor, Any]:
        state = DynamicCache()
        return self.forward(state, embeddings=embeddings), state

    def step(self, token: Tensor, state: Any) -> Tensor:
        return self.forward(state, ids=token[:, None])

    def forward(self, state: Any, ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Logits [b, vocab] behind the last token."""
        # Behind ids, mask and positions comes the cache, by its place: releases of transformers name it differently.
        out = self.model.model.language_model(ids, None, None, state, inputs_embeds=embeddings, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1]).float()


class Compiled(Dense):
    """torch.compile of tower, prefill and step, with transformers' cache of fixed size, which is made for it."""

    def set_up(self) -> None:
        # CUDA graphs for the steps, as transformers' `generate` has them.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._tower = torch.compile(super().encode, dynamic=False)
        self._prefill = torch.compile(super().forward, dynamic=False)
        self._step = torch.compile(super().forward, dynamic=False, mode=mode)
        self._cache = StaticCache(self.model.config.get_text_config(), max_cache_len=self.cell.length + self.room)

    def compile(self) -> dict[str, Any]:
        """Seconds of the first answer beyond a later one; warm: again, from the compiler's files."""
        seconds = []
        for _ in range(2):
            torch._dynamo.reset()
            first, second = (timed(lambda: self.generate((1, 3)))[1] for _ in range(2))
            seconds.append(max(first - second, 0.0))
        return {"cold_s": seconds[0], "warm_s": seconds[1], "program_bytes": {}}

    def encode(self) -> Tensor:
        return self._tower()

    def prefill(self, embeddings: Tensor) -> tuple[Tensor, Any]:
        self._cache.reset()
        return self._prefill(self._cache, embeddings=embeddings), self._cache

    def step(self, token: Tensor, state: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(state, ids=token[:, None])


class Sparse(TorchRunner):
    """SparseVLM; the variant is the engine's name."""

    def set_up(self) -> None:
        self.decoder = SparseDecoder(self.model.model.language_model, self.model.lm_head, self.plan, self.side.engine)
        start = int((self.ids[0] == self.cell.config.image_token_id).int().argmax())
        self.visual = Span(start, start + self.cell.visual_tokens)
        self.events: list[Event] = []

    def prefill(self, embeddings: Tensor) -> tuple[Tensor, Any]:
        logits, state, self.events = self.decoder.prefill(embeddings, self.visual)
        return logits, state

    def step(self, token: Tensor, state: State) -> Tensor:
        return self.decoder.decode_step(token, state)

    def selections(self) -> list[list[list[int]]]:
        """As `JaxRunner.selections`."""
        return [event.selection.kept.tolist() for event in self.events]

    def cache_bytes(self, state: State) -> int:
        return sum(t.numel() * t.element_size() for t in (*state.keys, *state.values))


def runner(cell: Cell, side: Side, room: int, device: str) -> TorchRunner:
    """The runner of a side by its engine."""
    kinds = {"eager": Dense, "sdpa": Dense, "compile": Compiled}
    return kinds.get(side.engine, Sparse)(cell, side, room, device)
