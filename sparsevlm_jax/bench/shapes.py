"""What is run: model shapes by name, cells of the matrix, and the sides that take turns in a cell.

No weights and no arrays here: everything that decides a shape is an int in a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Any

from sparsevlm_jax.config import QUANTIZATIONS, TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.layout import ImageLayout, Size
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.llava_next import LlavaNextConfig
from sparsevlm_jax.models.presets import llava_15_7b, llava_15_13b, llava_next_7b, tiny, video_llava_7b
from sparsevlm_jax.models.quantize import check_quantize
from sparsevlm_jax.models.video_llava import VideoLlavaConfig
from sparsevlm_jax.parallel.mesh import MeshShape
from sparsevlm_jax.pruning.methods import METHODS, sparsity
from sparsevlm_jax.pruning.settings import PRUNING_LAYERS, PUBLISHED_VISUAL_TOKENS, Sparsity
from sparsevlm_jax.rotary import plain_rope

PREFIX = 35  # tokens in front of the image in LLaVA-1.5's prompt


@dataclass(frozen=True)
class Shape:
    """A model and the prompt it is measured with.

    Attributes:
      visual_tokens, text_tokens: of a prompt; text is everything that is not visual.
      published: budgets mean the published counts after layers 2, 6 and 15, whatever the depth.
      budgets: equivalent tokens that are measured by default, from many to few.
      video: the prompt shows a video, and no images.
    """

    config: LlavaConfig
    visual_tokens: int
    text_tokens: int
    published: bool
    budgets: tuple[int, ...]
    video: bool = False


@dataclass(frozen=True)
class Cell:
    """A point of the matrix. `visual_tokens` are those of one prompt, all its images or frames together."""

    shape: str
    batch: int
    text_tokens: int
    visual_tokens: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.shape}-b{self.batch}-t{self.text_tokens}-v{self.visual_tokens}-{self.dtype}"

    @property
    def config(self) -> LlavaConfig:
        """The shape's model; its images have another size where that is what the visual tokens ask for.

        Raises:
          UserError: no images, or frames, give that many visual tokens.
        """
        config = SHAPES[self.shape].config
        if self.visual_tokens % self.tokens_each == 0:
            return config
        if self.video:
            raise UserError(
                f"visual_tokens={self.visual_tokens}: expected a multiple of {self.tokens_each}, which a frame of "
                f"{self.shape} becomes"
            )
        if config.most_tiles > 1:
            raise UserError(
                f"visual_tokens={self.visual_tokens}: expected a multiple of {config.tokens_per_image}, which an image "
                f"becomes that fills the largest canvas of {self.shape}"
            )
        side = isqrt(self.visual_tokens)
        if side**2 != self.visual_tokens:
            raise UserError(
                f"visual_tokens={self.visual_tokens}: expected a square, or a multiple of {config.tokens_per_image}"
            )
        return replace(config, vision=replace(config.vision, image_size=side * config.vision.patch_size))

    @property
    def video(self) -> bool:
        """Whether a prompt shows a video, and no images."""
        return SHAPES[self.shape].video

    @property
    def tokens_each(self) -> int:
        """Visual tokens of an image of the shape's own size, or of a frame."""
        config = SHAPES[self.shape].config
        return config.video_layout(1).tokens if self.video else config.tokens_per_image

    @property
    def images(self) -> int:
        """Of one prompt, or frames of its video."""
        return self.visual_tokens // (self.tokens_each if self.video else self.config.tokens_per_image)

    @property
    def image_size(self) -> Size:
        """Height and width of its images: those that become most visual tokens."""
        return self.config.fullest_image

    @property
    def layouts(self) -> list[ImageLayout]:
        """What the visual tokens of all rows are, image by image, or video by video."""
        if self.video:
            return [self.config.video_layout(self.images)] * self.batch
        return [self.config.image_layout(self.image_size)] * (self.batch * self.images)

    @property
    def length(self) -> int:
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True)
class Side:
    """One column of the matrix: who runs, and what.

    Attributes:
      engine: "jax"; "eager", "sdpa", "compile" (PyTorch, dense); "faithful", "best", "batched" (PyTorch SparseVLM).
      method: a name in `methods.METHODS`.
      keep: equivalent tokens, or None for the method's default.
      mesh: of JAX's the devices that share the model, as "tensor=4"; empty for one.
      quantize: of JAX's how the decoder's weights are held, see `load`; empty for the cell's dtype.
    """

    engine: str
    method: str
    keep: int | None = None
    mesh: str = ""
    quantize: str = ""

    @property
    def name(self) -> str:
        budget = "" if self.keep is None else f"@{self.keep}"
        return "/".join(filter(None, (f"{self.engine}:{self.method}{budget}", self.quantize, self.mesh)))

    @property
    def counterpart(self) -> tuple[str, int | None, str]:
        """What has to agree among sides: the same method at the same budget, on the same weights."""
        return self.method, self.keep, self.quantize

    @classmethod
    def parse(cls, text: str, visual_tokens: int) -> Side:
        """Reads ENGINE:METHOD[@KEEP][/int8][/MESH]; KEEP may be a share of the visual tokens, as in 33%.

        Raises:
          UserError: an unknown engine or method, or one that the engine does not run.
        """
        before, *after = text.split("/")
        engine, _, rest = before.partition(":")
        method, _, budget = rest.partition("@")
        if engine not in ENGINES:
            raise UserError(f'sides="{text}": no engine "{engine}", expected one of {", ".join(ENGINES)}')
        if method not in ENGINES[engine]:
            raise UserError(f'sides="{text}": {engine} runs {", ".join(ENGINES[engine])}, not "{method}"')
        try:
            share = budget.endswith("%")
            keep = round(visual_tokens * float(budget[:-1]) / 100) if share else int(budget) if budget else None
        except ValueError:
            raise UserError(f'sides="{text}": "{budget}" is neither a number of tokens nor a share as 33%') from None
        side = cls(engine, method, keep)
        for part in after:
            side = side.held_in(part) if part in QUANTIZATIONS else side.on(part)
        return side

    def on(self, mesh: str) -> Side:
        """The same on several devices.

        Raises:
          UserError: an engine that runs on one, or what is no mesh.
        """
        if not mesh:
            return self
        if self.engine != "jax":
            raise UserError(f'mesh="{mesh}": {self.engine} runs on one device')
        return replace(self, mesh=str(MeshShape.parse(mesh)))

    def held_in(self, quantize: str | None) -> Side:
        """The same with its weights held so.

        Raises:
          UserError: no such way to hold them, or an engine that knows none.
        """
        check_quantize(quantize)
        if quantize and self.engine != "jax":
            raise UserError(f'quantize="{quantize}": {self.engine} takes its weights as they are')
        return replace(self, quantize=quantize or "")

    def sparsity(self, shape: Shape, visual_tokens: int) -> Sparsity:
        """The settings that the budget means in this shape."""
        # As many heads as released, or half of a model that has fewer than those of the released models.
        method = METHODS[self.method]
        heads = min(14, shape.config.text.num_attention_heads // 2) if "heads" in method.options else None
        counts = method.published_counts.get(self.keep or 0)
        if shape.published and counts and visual_tokens == PUBLISHED_VISUAL_TOKENS:
            return sparsity(self.method, keep_at=tuple(zip(PRUNING_LAYERS, counts, strict=True)), heads=heads)
        return sparsity(self.method, keep=self.keep, heads=heads)


def _small() -> LlavaConfig:
    """The tower of LLaVA-1.5 and a decoder that two CPU cores run in seconds."""
    full = llava_15_7b()
    return replace(full, text=_decoder(full.text, layers=24, width=1024, ffn=2816, heads=16))


def _quick() -> LlavaConfig:
    full = llava_15_7b()
    vision = replace(full.vision, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
    text = replace(_decoder(full.text, layers=16, width=256, ffn=704, heads=8), vocab_size=4096)
    return replace(full, vision=vision, text=text, image_token_id=4000)


def _tiny(**own: Any) -> dict[str, Any]:
    """The tower, projector and decoder of `tiny`, with what a family has of its own."""
    return {field.name: getattr(tiny(), field.name) for field in fields(LlavaConfig)} | own


def _tiny_next() -> LlavaNextConfig:
    return LlavaNextConfig(**_tiny(model_type="llava_next", canvases=((56, 112), (112, 112))))


def _tiny_video() -> VideoLlavaConfig:
    return VideoLlavaConfig(**_tiny(model_type="video_llava", video_token_id=191))


def _decoder(text: TextConfig, layers: int, width: int, ffn: int, heads: int) -> TextConfig:
    return replace(
        text,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        rope=plain_rope(width // heads, text.rope.theta),
    )


SHAPES = {
    "small": Shape(_small(), 576, 88, published=True, budgets=(192, 128, 64)),
    "quick": Shape(_quick(), 576, 64, published=True, budgets=(192,)),
    "llava-1.5-7b": Shape(llava_15_7b(), 576, 118, published=True, budgets=(192, 128, 64)),
    "llava-1.5-13b": Shape(llava_15_13b(), 576, 118, published=False, budgets=(192, 128, 64)),
    "llava-next-7b": Shape(llava_next_7b(), 2928, 118, published=False, budgets=(960, 640, 320)),
    "video": Shape(video_llava_7b(), 2056, 118, published=False, budgets=(640, 320, 194), video=True),
    # For tests.
    "tiny": Shape(tiny(), 16, 48, published=False, budgets=(8,)),
    "tiny-next": Shape(_tiny_next(), 88, 48, published=False, budgets=(30,)),
    "tiny-video": Shape(_tiny_video(), 51, 48, published=False, budgets=(20,), video=True),
}
_PYTORCH_SPARSE = ("v1", "v1.5", "v2.0")  # what the port in PyTorch knows
ENGINES = {
    "jax": tuple(METHODS),
    "eager": ("dense",),
    "sdpa": ("dense",),
    "compile": ("dense",),
    "faithful": _PYTORCH_SPARSE,
    "best": _PYTORCH_SPARSE,
    "batched": ("v1.5", "v2.0"),
}
ONE_ROW = ("faithful", "best")  # engines that take a batch of one only


def default_sides(shape: Shape) -> list[str]:
    """Dense on both, v1.5 at every budget, and PyTorch's SparseVLM at the first."""
    first = shape.budgets[0]
    return [
        "jax:dense",
        *(f"jax:v1.5@{budget}" for budget in shape.budgets),
        "sdpa:dense",
        f"faithful:v1.5@{first}",
        f"best:v1.5@{first}",
        f"batched:v1.5@{first}",
        "eager:dense",
        "compile:dense",
        f"jax:v2.0@{first}",
        f"jax:fastv@{first}",
        f"jax:random@{first}",
    ]
