"""How much a file may ask for. Everything beyond is refused before it costs memory or time.

Each bound lies well above what any published LLaVA checkpoint holds, and low enough that what is refused, or just
accepted, takes less than two seconds and a gigabyte.
"""

from __future__ import annotations

from sparsevlm_jax.errors import UserError, shown

# Text.
JSON_BYTES = 4_000_000  # an index of LLaVA-1.5-13B has 0.08 MB, a manifest 0.4 MB; Python takes up to 100 times as much
JSON_DEPTH = 40  # nested lists and objects; a config.json has 4 levels
JSON_PART_BYTES = 40  # of a file for each list or object in it, at least: a million empty ones take seconds to read
JSON_DIGITS = 100  # of one number; a float64 needs 17, a size 20
TOKENIZER_BYTES = 20_000_000  # Vicuna's tokenizer.json has 1.8 MB, Llama 3's 17 MB
TOKENIZER_GROWTH = 1_000  # times that a text may get longer before it is tokens
TOKENIZER_FRAME = 256  # tokens that are put around a text

# Questions and answers, and what they are scored by.
LINE_BYTES = 1_000_000  # of one question or answer; those of TextVQA, with the words on an image, have 2 kB
QUESTION_CHARACTERS = 100_000  # with its id: an answer repeats both, each at most six bytes, and has to fit a line
LINES = 2_000_000  # the test questions of VQAv2 are 447,793
FIELD_BYTES = 20_000_000  # of one field of a table, such as an image in base64
TRUTH_BYTES = 400_000_000  # of a file of true answers; GQA's balanced validation questions have 90 MB

# Tensors of one safetensors header.
DIMENSIONS = 8  # a convolution's kernel has 4

# A configuration: ten times LLaVA-1.5-13B, and no less than the largest published Llama decoders and CLIP towers.
SIZES = {
    "hidden_size": 65_536,
    "intermediate_size": 524_288,
    "num_hidden_layers": 256,  # tracing takes 25 ms for each
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 1_024,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 16_777_216,
    "sliding_window": 16_777_216,
    "image_size": 2_048,  # pixels per side: 50 MB as float32
    "patch_size": 2_048,
    "num_channels": 3,  # images are RGB
}
VISUAL_TOKENS = 16_384  # of one image; LLaVA-1.5 has 576
TOKEN_ID = 2**31 - 1  # ids are int32
END_TOKENS = 1_000  # of one model
NUMBER = 1e18  # rotary base and norms' epsilon, which are computed with in float32


def positive(value: object, name: str) -> float:
    """A number as a file states it.

    Raises:
      UserError: it is no number, not above zero, or above `NUMBER`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= NUMBER:
        raise UserError(f"{name} is {shown(value)}, expected a positive number, at most {NUMBER:g}")
    return float(value)


# Images.
# 8192 x 6144, the largest that common telephones take; also of what an image is padded or enlarged to. Decoding takes
# 8 bytes for each (JPEG), 12 with transparency, 20 at worst (WebP with transparency): a gigabyte.
PIXELS = 50_331_648

# Videos.
FRAMES = 768  # that are sampled of one video; published systems take 8 to 64, Qwen2-VL up to 768
VIDEO_PIXELS = 4 * PIXELS  # of all sampled frames: 600 MB; 24 frames of 3840 x 2160, 97 of 1920 x 1080
VIDEO_FRAMES = 1_000_000  # of one file, which are all decoded to be counted: nine hours at 30 a second

# A chat template and one rendering of it. Published ones have up to 30,000 characters and run some hundred steps.
TEMPLATE_SOURCE = 65_536  # characters
TEMPLATE_STEPS = 100_000  # blocks, calls and filters
TEMPLATE_SECONDS = 1.0
TEMPLATE_VALUE = 500_000  # characters and items of one value, and of the text
TEMPLATE_TOTAL = 3_000_000  # of all values
TEMPLATE_BITS = 4_096  # of an integer
