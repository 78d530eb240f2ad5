"""Configurations: what published and faulty config.json files become."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models import presets
from sparsevlm_jax.models.family import config_from_hf
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.rotary import plain_rope

# As sparse as the config.json of llava-hf/llava-1.5-7b-hf: no sizes, heads, depth or activation of the decoder.
PUBLISHED_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
PHI3 = {"model_type": "phi3"}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
TINY = json.loads((Path(__file__).parent / "golden/tiny_llava_hf/config.json").read_text())


def changed(path: str, value: Any, base: dict[str, Any] = PUBLISHED_7B) -> dict[str, Any]:
    result = node = copy.deepcopy(base)
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    return result


def test_the_published_7b_config_is_the_preset():
    assert LlavaConfig.from_hf(PUBLISHED_7B) == presets.llava_15_7b()


def test_the_published_13b_config_is_the_preset():
    text = PUBLISHED_7B["text_config"] | SIZES_13B
    assert LlavaConfig.from_hf(PUBLISHED_7B | {"text_config": text}) == presets.llava_15_13b()


def test_a_config_written_by_transformers_5_is_the_preset():
    assert LlavaConfig.from_hf(TINY) == presets.tiny()


def test_missing_key_value_heads_mean_as_many_as_heads():
    text = PUBLISHED_7B["text_config"] | SIZES_13B | {"num_key_value_heads": None}
    assert LlavaConfig.from_hf(PUBLISHED_7B | {"text_config": text}).text.num_key_value_heads == 40


@pytest.mark.parametrize(
    "where", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_the_rotary_base_is_read_where_4x_and_5x_write_it(where):
    text = PUBLISHED_7B["text_config"] | where
    assert LlavaConfig.from_hf(PUBLISHED_7B | {"text_config": text}).text.rope == plain_rope(128, 5e5)


@pytest.mark.parametrize("where", ["tie_word_embeddings", "text_config.tie_word_embeddings"])
def test_tied_embeddings_are_read_at_both_levels(where):
    assert LlavaConfig.from_hf(changed(where, True)).text.tie_word_embeddings


def mistral(**entries: Any) -> dict[str, Any]:
    """As sparse as the config.json of llava-hf/bakLlava-v1-hf."""
    text = {"model_type": "mistral", "max_position_embeddings": 32768, "num_key_value_heads": 8, "vocab_size": 32064}
    return PUBLISHED_7B | {"text_config": text | entries}


@pytest.mark.parametrize(
    ("entries", "limit"),
    [
        ({}, "sliding window of 4096"),
        ({"sliding_window": 1024}, "sliding window of 1024"),
        ({"sliding_window": None}, "context of 32768"),
        ({"sliding_window": 65536}, "context of 32768"),
        ({"model_type": "qwen2", "sliding_window": 1024}, "context of 32768"),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, "sliding window of 1024"),
        ({"model_type": "phi3", "sliding_window": 2047, "num_key_value_heads": 32}, "sliding window of 2047"),
        ({"model_type": "llama", "sliding_window": 1024}, "context of 32768"),
    ],
    ids=str,
)
def test_a_prompt_may_be_as_long_as_the_window(entries, limit):
    assert LlavaConfig.from_hf(mistral(**entries)).text.limit == limit


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2", "gemma"])
@pytest.mark.parametrize("text", [None, True, False])
@pytest.mark.parametrize("top", [None, True, False])
def test_a_head_is_tied_where_the_torch_model_ties_it(decoder, text, top):
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    stated = {} if text is None else {"tie_word_embeddings": text}
    config = {
        "model_type": "llava",
        **({} if top is None else {"tie_word_embeddings": top}),
        "image_token_index": 30,
        "text_config": {"model_type": decoder, "vocab_size": 32, "num_key_value_heads": 1, **sizes, **stated},
        "vision_config": {**TINY["vision_config"]},
    }
    with torch.device("meta"):
        whole: Any = AutoConfig.for_model(**copy.deepcopy(config))
        model = LlavaForConditionalGeneration(whole)
        model.tie_weights()
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert LlavaConfig.from_hf(config).text.tie_word_embeddings == tied


def test_gemmas_legacy_name_of_its_activation_means_the_tanh_one():
    text = {"model_type": "gemma", "hidden_act": "gelu", "num_hidden_layers": 1}
    found = LlavaConfig.from_hf(changed("text_config", text)).text
    assert (found.hidden_act, found.head_dim, found.tie_word_embeddings) == ("gelu_pytorch_tanh", 256, True)


def test_a_decoder_that_sees_both_ways_is_refused():
    text = {"model_type": "gemma", "use_bidirectional_attention": True}
    with pytest.raises(UserError, match="use_bidirectional_attention is set"):
        LlavaConfig.from_hf(changed("text_config", text))


def test_several_feature_layers_become_a_tuple():
    assert LlavaConfig.from_hf(changed("vision_feature_layer", [-2, -5])).feature_layers == (-2, -5)


# What the decoders of published LLaVA-NeXT checkpoints say of themselves, beside what LLaVA-1.5's says.
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 1e6}
LLAMA_3 = {"num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 5e5, "vocab_size": 128320}
DECODERS: dict[str, dict[str, Any]] = {
    "llava-next-7b": {},
    "llava-next-13b": SIZES_13B,
    "llava-next-mistral-7b": {**MISTRAL, "max_position_embeddings": 32768, "sliding_window": None},
    "llava-next-llama3-8b": {**LLAMA_3, "max_position_embeddings": 8192},
}


@pytest.mark.parametrize("name", DECODERS)
def test_presets_of_llava_next_are_what_a_sparse_file_becomes(name):
    text = PUBLISHED_7B["text_config"] | DECODERS[name]
    marker = 128256 if "llama3" in name else 32000
    found = config_from_hf(
        PUBLISHED_7B | {"model_type": "llava_next", "text_config": text, "image_token_index": marker}
    )
    assert found == presets.PRESETS[name]()


def test_a_mistral_that_leaves_its_window_out_has_one():
    config = PUBLISHED_7B | {"model_type": "llava_next", "text_config": {**MISTRAL, "max_position_embeddings": 32768}}
    assert config_from_hf(config).text.limit == "sliding window of 4096"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [({}, (-2, -5, -8, -11, 6)), ({"vision_feature_layers": [-3, 2]}, (-3, 2)), ({"vision_feature_layer": -2}, (-2,))],
    ids=str,
)
def test_vipllava_takes_its_layers_under_either_name(layers, expected):
    published = {key: value for key, value in PUBLISHED_7B.items() if not key.startswith("vision_feature")}
    found = config_from_hf(published | {"model_type": "vipllava"} | layers)
    assert found.feature_layers == expected
    assert isinstance(found, LlavaConfig) and found.projector_norm_eps == 1e-5
    assert found.tokens_per_image == 576


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=presets.PRESETS)
def test_presets_are_hashable(preset):
    assert hash(preset()) == hash(preset())


@pytest.mark.parametrize(
    ("strategy", "tokens"), [("default", 576), ("full", 577)], ids=["without class token", "with class token"]
)
def test_tokens_per_image(strategy, tokens):
    assert LlavaConfig.from_hf(changed("vision_feature_select_strategy", strategy)).tokens_per_image == tokens


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava_next", 'model_type is "llava_next"'),
        ("model_type", "llava_llama", "original LLaVA layout; convert it"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "original LLaVA layout; convert it"),
        ("text_config.model_type", "gemma2", 'text_config.model_type is "gemma2".*soft-capped'),
        ("text_config.model_type", "gemma3_text", 'text_config.model_type is "gemma3_text".*see a window'),
        ("text_config", PHI3 | {"rope_scaling": LONGROPE}, 'rope type "longrope" is not supported'),
        ("text_config", PHI3 | {"partial_rotary_factor": 0.75}, "partial_rotary_factor of text_config is 0.75"),
        ("text_config.partial_rotary_factor", 0.5, "partial_rotary_factor of text_config is 0.5"),
        ("text_config.model_type", "phi", 'text_config.model_type is "phi", .*side by side'),
        ("text_config.model_type", "bert", 'text_config.model_type is "bert", expected "llama" or [^:]*$'),
        ("vision_config.model_type", "dinov2", 'vision_config.model_type is "dinov2"'),
        ("text_config.rope_scaling", {"type": "dynamic", "factor": 2.0}, 'rope type "dynamic" is not supported'),
        ("text_config.rope_theta", -1.0, "rope_theta of text_config is -1.0"),
        ("text_config.hidden_act", "mish", 'text_config.hidden_act is "mish"'),
        ("text_config.num_hidden_layers", 0, "text_config.num_hidden_layers is 0"),
        ("text_config.num_key_value_heads", 5, "text_config.num_key_value_heads is 5"),
        ("text_config.head_dim", 33, "transformers does not accept this configuration: .*even"),
        ("vision_config.image_size", None, "vision_config.image_size is None"),
        ("vision_config.patch_size", 13, "vision_config.patch_size is 13"),
        ("vision_feature_layer", -26, "vision_feature_layer -26 is out of range"),
        ("vision_feature_select_strategy", "cls", "vision_feature_select_strategy"),
        ("projector_hidden_act", 3, "projector_hidden_act"),
        ("image_token_index", 1e30, "image_token_index.*1e.30"),
        ("image_token_index", -1, "image_token_index is -1"),
        ("vision_feature_layer", [], r"vision_feature_layer is \[\]"),
        ("vision_feature_layer", [-2, 1.5], "vision_feature_layer"),
        ("vision_feature_layer", True, "vision_feature_layer.*True"),
        ("text_config.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected at most 256"),
        ("text_config.num_hidden_layers", 2.0, "num_hidden_layers is 2.0"),
        ("text_config.head_dim", 10**9, "head_dim is 1000000000, expected at most"),
        ("text_config.vocab_size", 10**80, "vocab_size is 1000.*, expected at most"),
        ("vision_config.image_size", 10**6, "image_size is 1000000, expected at most"),
        ("vision_config.patch_size", 1, "an image becomes 112,896 visual tokens"),
        ("text_config.rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("text_config.rope_theta", float("inf"), "rope_theta of text_config is inf"),
        ("text_config.attention_bias", 3, "attention_bias"),
        ("text_config", [1], r"text_config is \[1\]"),
        ("vision_config.model_type", [1], r"model_type is \[1\]"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, 'quantised with "bitsandbytes" .quantization_config'),
    ],
)
def test_a_model_that_is_not_computed_is_refused_by_name(path, value, message):
    with pytest.raises(UserError, match=message) as raised:
        LlavaConfig.from_hf(changed(path, value), "some/config.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("\xff", "cannot be read as JSON"),
        ("[" * 90_000, "nested more than 40 deep"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", "nested more than 40 deep"),
        ('{"a": ' + "1" * 5_000 + "}", "a number of 5000 digits"),
        ('{"a": 1, "a": 2}', "repeats 'a'"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        (" " * 4_000_001 + "{}", "has more than 4,000,000 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        LlavaConfig.from_file(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        LlavaConfig.from_file(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PUBLISHED_7B).encode())
    assert LlavaConfig.from_file(tmp_path) == presets.llava_15_7b()


def test_entries_that_are_not_used_do_not_reach_transformers():
    """There they would make tables as long as they say."""
    text = PUBLISHED_7B["text_config"] | {"num_labels": 10**12, "layer_types": ["odd"]}
    assert LlavaConfig.from_hf(PUBLISHED_7B | {"text_config": text, "num_labels": 10**12}) == presets.llava_15_7b()
