"""A small LLaVA with random weights, and a photograph: something to run on without a download.

Its answers are noise. It shows what the package computes and how fast, not what a model says.
"""

from __future__ import annotations

import json
import os
import shutil
import string
import uuid
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.processing import PROMPT_END, PROMPT_START

IS_TRAINED = False

VERSION = 1  # of what build() writes: raise it with every change, so that nobody keeps an old one in the cache
UNKNOWN, BOS, EOS, PAD, IMAGE = SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
MAX_VOCABULARY = 512
PIXELS = 96
PATCH = 8

# Words for the tokenizer: enough for a short question to be a few dozen tokens.
TEXT = (
    PROMPT_START + PROMPT_END + " What is in this picture? What do you see? Describe the image. Describe what you see. "
    "Where is the photograph taken? Who is in the photo? How many people are there? Is there a dog or a cat? "
    "What colour is the sky? What color is the roof? Is it day or night? Which animals are shown here? "
    "There is a large building with a red roof behind the trees. A temple stands near the water. The picture shows "
    "a house, a street, a car and a bridge under a blue sky. Two people walk along the road in front of the gate. "
    "The answer is yes. The answer is no. One, two, three, four, five, six, seven, eight, nine, ten. In the "
    "background, on the left, on the right, above, below, between. It looks like an old palace in the morning light. "
    "Please answer in one word. Explain why. Compare these images. What is the difference between the first and the "
    "second picture? The weather is sunny, cloudy or rainy. A man wears a white shirt and a woman holds a green bag."
)

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "pad_token_id": SPECIAL.index(PAD),
}
# As CLIP's own processors have them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class QuestionAnswer(NamedTuple):
    """A question and the truth."""

    question: str
    answer: str


class Sample(NamedTuple):
    """A held-out picture with questions about it."""

    picture: Path
    questions: tuple[QuestionAnswer, ...]


def samples() -> list[Sample]:
    """Pictures that the trained model never saw, with questions.

    Raises:
      UserError: the embedded model is not trained.
    """
    folder = Path(str(resources.files("sparsevlm_jax") / "data" / "pictures"))
    if not IS_TRAINED:
        raise UserError("the embedded model has random weights, it answers nothing yet: ask or explain with --model")
    listed = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [
        Sample(folder / picture, tuple(QuestionAnswer(**pair) for pair in questions))
        for picture, questions in listed.items()
    ]


def build(path: str | Path, seed: int = 0) -> Path:
    """Writes the demo model as a Hugging Face folder, float32, about 11 MB. The same seed gives the same bytes.

    It is written beside `path` and renamed, so that no one ever sees half of it.

    Raises:
      UserError: `path` exists, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already, choose another folder for the demo model")
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, seed)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: the demo model cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def path() -> Path:
    """The demo model in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), built at first use.

    Raises:
      UserError: the cache folder cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sparsevlm_jax" / f"demo-{VERSION}"
    if not folder.exists():
        try:
            build(folder)
        except UserError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def photo() -> Path:
    """The photograph that comes with the package (CC BY 2.0, see data/README.md)."""
    return Path(str(resources.files("sparsevlm_jax") / "data" / "china.jpg"))


def _write(folder: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    tokenizer = _tokenizer()
    vocabulary = tokenizer.get_vocab_size()
    tokens = {key: LANGUAGE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "dtype": "float32",
            "image_token_index": SPECIAL.index(IMAGE),
            "image_seq_length": (PIXELS // PATCH) ** 2,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": False,
            "vision_config": VISION,
            "text_config": {**LANGUAGE, "vocab_size": vocabulary},
        },
        "generation_config.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": LANGUAGE["max_position_embeddings"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": PIXELS},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": PIXELS, "width": PIXELS},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": STD,
            "do_convert_rgb": True,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    save_file(_weights(vocabulary, seed), folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> Any:
    """Byte-level BPE, trained on TEXT. Only printable ASCII: the random model cannot write control characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    printable = string.ascii_letters + string.digits + string.punctuation + " \n"
    alphabet = sorted({character for text, _ in byte_level.pre_tokenize_str(printable) for character in text})
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def _weights(vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights under the names of the published LLaVA-1.5 files.

    Queries and keys are drawn wide, so that attention prefers some tokens to others; a uniform one would give
    pruning nothing to choose by. Embeddings are drawn so that text and visual tokens are of similar length.
    """
    random = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def normal(name: str, shape: tuple[int, ...], std: float) -> None:
        weights[name] = std * random.standard_normal(shape, np.float32)

    def linear(name: str, inputs: int, outputs: int, *, bias: bool, std: float = 0.05) -> None:
        normal(f"{name}.weight", (outputs, inputs), std)
        if bias:
            normal(f"{name}.bias", (outputs,), 0.02)

    def norm(name: str, width: int, *, bias: bool) -> None:
        weights[f"{name}.weight"] = np.ones(width, np.float32)
        if bias:
            weights[f"{name}.bias"] = np.zeros(width, np.float32)

    tower, width = "vision_tower.vision_model", VISION["hidden_size"]
    normal(f"{tower}.embeddings.class_embedding", (width,), 0.5)
    normal(f"{tower}.embeddings.patch_embedding.weight", (width, 3, PATCH, PATCH), 0.05)
    normal(f"{tower}.embeddings.position_embedding.weight", ((PIXELS // PATCH) ** 2 + 1, width), 0.3)
    norm(f"{tower}.pre_layrnorm", width, bias=True)  # spelled so in every published file
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        norm(f"{layer}.layer_norm1", width, bias=True)
        for name, std in (("q_proj", 0.1), ("k_proj", 0.1), ("v_proj", 0.05), ("out_proj", 0.05)):
            linear(f"{layer}.self_attn.{name}", width, width, bias=True, std=std)
        norm(f"{layer}.layer_norm2", width, bias=True)
        linear(f"{layer}.mlp.fc1", width, VISION["intermediate_size"], bias=True)
        linear(f"{layer}.mlp.fc2", VISION["intermediate_size"], width, bias=True)
    norm(f"{tower}.post_layernorm", width, bias=True)

    inner = LANGUAGE["hidden_size"]
    linear("multi_modal_projector.linear_1", width, inner, bias=True)
    linear("multi_modal_projector.linear_2", inner, inner, bias=True)

    decoder = "language_model.model"
    normal(f"{decoder}.embed_tokens.weight", (vocabulary, inner), 0.3)
    for i in range(LANGUAGE["num_hidden_layers"]):
        layer = f"{decoder}.layers.{i}"
        norm(f"{layer}.input_layernorm", inner, bias=False)
        for name, std in (("q_proj", 0.1), ("k_proj", 0.1), ("v_proj", 0.05), ("o_proj", 0.05)):
            linear(f"{layer}.self_attn.{name}", inner, inner, bias=False, std=std)
        norm(f"{layer}.post_attention_layernorm", inner, bias=False)
        linear(f"{layer}.mlp.gate_proj", inner, LANGUAGE["intermediate_size"], bias=False)
        linear(f"{layer}.mlp.up_proj", inner, LANGUAGE["intermediate_size"], bias=False)
        linear(f"{layer}.mlp.down_proj", LANGUAGE["intermediate_size"], inner, bias=False)
    norm(f"{decoder}.norm", inner, bias=False)
    linear("language_model.lm_head", inner, vocabulary, bias=False)
    return weights
