"""Tokenizer, image processor and chat template out of a model's folder, whoever wrote it.

transformers makes the first two, of what was checked here and nothing else: it reads more files than a folder should
have, follows their links and the names in them, and can load a model or run code for either.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, first_line, shown
from sparsevlm_jax.files import inside, parse_json, read_bytes, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# Classes that a checkpoint may ask for, without the "Fast" of older releases: none runs code of its own or reads more.
TOKENIZERS = (
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)
IMAGE_PROCESSORS = (
    "CLIPImageProcessor",
    "LlavaImageProcessor",
    "LlavaNextImageProcessor",
    "SiglipImageProcessor",
    "VideoLlavaImageProcessor",
)
_AS_CLIP = ("VideoLlavaImageProcessor",)  # the same pixels from the same settings

# Entries of tokenizer_config.json that are about text, beside those named after tokens; the others are about files,
# classes and code.
_TOKENIZER_SETTINGS = (
    "add_prefix_space",
    "added_tokens_decoder",
    "clean_up_tokenization_spaces",
    "legacy",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "processor_class",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "tokenizer_class",
    "truncation_side",
    "use_default_system_prompt",
)
_SWITCHES = (
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_pad",
    "default_to_square",
)
_MODEL_TYPES = ("llava", "llama")
_KEPT_COPIES = ("special_tokens_map.json", "added_tokens.json")


def there(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder has one of the files, or something by its name."""
    return any((folder / name).is_symlink() or (folder / name).exists() for name in names)


def read_tokenizer(folder: Path, model_type: str | None = None) -> Any:
    """The folder's tokenizer.

    Args:
      model_type: by which transformers chooses between the classes that the files name and its own; by default that
        of the folder's config.json.

    Raises:
      UserError: a file that cannot be used, or a class that is not one of TOKENIZERS.
    """
    from transformers import AutoTokenizer  # here: it imports torch where torch is installed

    copies = {}
    config = {"model_type": model_type} if model_type else read_json(inside(folder, "config.json"), missing={})
    if config.get("model_type") in _MODEL_TYPES:
        copies["config.json"] = json.dumps({"model_type": config["model_type"]}).encode()
    for name in TOKENIZER_FILES:
        if there(folder, (name,)):
            copies[name] = read_bytes(inside(folder, name), bounds.TOKENIZER_BYTES)
    for name in _KEPT_COPIES:
        if there(folder, (name,)):
            copies[name] = json.dumps(read_json(inside(folder, name))).encode()
    copies["tokenizer_config.json"] = json.dumps(_tokenizer_settings(folder)).encode()
    whole = None
    if "tokenizer.json" in copies:
        whole = _parse_tokenizer(folder / "tokenizer.json", copies["tokenizer.json"])
        copies["tokenizer.json"] = copies["tokenizer.json"].removeprefix(codecs.BOM_UTF8)  # its reader takes none
    try:
        if whole is not None:
            _check_growth(whole)
        with TemporaryDirectory() as place:
            for name, content in copies.items():
                (Path(place) / name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file surfaces as any of many unrelated types
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    tokenizer.name_or_path = str(folder)
    if "tokenizer.model" in copies:
        tokenizer.vocab_file = str(folder / "tokenizer.model")
    return tokenizer


def read_image_processor(folder: Path) -> Any:
    """The folder's image processor, on Pillow.

    Not by way of transformers' AutoImageProcessor, which asks for torchvision in some 5.x releases.

    Raises:
      UserError: it is none of IMAGE_PROCESSORS, or a setting makes no pixels.
    """
    import transformers

    # Nested in the first file by transformers 5.x, alone in the second by 4.x.
    file = inside(folder, "processor_config.json")
    settings = read_json(file, missing={}).get("image_processor")
    if not settings:
        file = inside(folder, "preprocessor_config.json")
        settings = read_json(file, missing={})
    if not isinstance(settings, dict):
        raise UserError(f"{file}: image_processor is {shown(settings)}, expected a JSON object")
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or IMAGE_PROCESSORS[0]
    name = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in IMAGE_PROCESSORS:
        raise UserError(f"{file}: the image processor {shown(kind)} is none of {', '.join(IMAGE_PROCESSORS)}")
    known = dict(_image_settings(settings, file))
    # The plain name was Pillow's until torchvision took it over.
    name = "CLIPImageProcessor" if name in _AS_CLIP else name
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    try:
        return cls(**known)
    except Exception as error:  # settings that do not go together, so any type
        raise UserError(f"{file}: the image processor cannot be loaded: {first_line(error)}") from error


def read_chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The processor's template (a file of its own, or an entry of one, by age), else the tokenizer's.

    Raises:
      UserError: it cannot be read, or is no text.
    """
    if there(folder, ("chat_template.jinja",)):
        file = inside(folder, "chat_template.jinja")
        try:
            return read_bytes(file, 4 * bounds.TEMPLATE_SOURCE).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8: {error}") from None
    names = ("chat_template.json", "processor_config.json")
    found = (read_json(inside(folder, name), missing={}).get("chat_template") for name in names)
    template = next(filter(None, found), None) or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: chat_template is {shown(template)}, expected a text")
    return template


def _parse_tokenizer(file: Path, content: bytes) -> dict[str, Any]:
    """tokenizer.json, which no other reader looks at twice for depth, repeats and a byte order mark.

    Raises:
      UserError: no JSON, or not that of a tokenizer.
    """
    found = parse_json(content, str(file), bounds.TOKENIZER_BYTES)
    if not isinstance(found.get("model"), dict):
        raise UserError(f"{file}: holds no tokenizer: model is {shown(found.get('model'))}, expected a JSON object")
    return found


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What of tokenizer_config.json is handed on."""
    file = inside(folder, "tokenizer_config.json")
    settings = read_json(file, missing={})
    cls, longest = settings.get("tokenizer_class"), settings.get("model_max_length")
    if cls is not None and str(cls).removesuffix("Fast") not in TOKENIZERS:
        raise UserError(f"{file}: the tokenizer class {shown(cls)} is none of {', '.join(TOKENIZERS)}")
    if longest is not None and (type(longest) not in (int, float) or not longest > 0):
        raise UserError(f"{file}: model_max_length is {shown(longest)}, expected a positive number")
    template = settings.get("chat_template")
    if not isinstance(template, str | list | dict | None):
        raise UserError(f"{file}: chat_template is {shown(template)}, expected a text")
    return {
        key: value
        for key, value in settings.items()
        if key in _TOKENIZER_SETTINGS or key == "chat_template" or key.endswith(("_token", "_tokens"))
    }


def _check_growth(tokenizer: Any) -> None:
    """Rules that rewrite text may make it longer, each of what the one before has made.

    Raises:
      ValueError: by more than `bounds.TOKENIZER_GROWTH` in all.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for rule in _rules(tokenizer.get(part)):
            content = rule.get("content", rule.get("replacement", ""))
            old = rule.get("pattern", {})
            old = old.get("String", "") if isinstance(old, dict) else ""
            if rule.get("type") == "Replace" and isinstance(content, str):
                growth *= max(1, len(content) / max(1, len(old))) + (not old)
            if growth > bounds.TOKENIZER_GROWTH:
                raise ValueError(f"its {part} makes a text more than {bounds.TOKENIZER_GROWTH} times as long")
    frame = (tokenizer.get("post_processor") or {}).get("single") or []
    if len(frame) > bounds.TOKENIZER_FRAME:
        raise ValueError(f"its post_processor puts more than {bounds.TOKENIZER_FRAME} tokens around a text")


def _rules(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json, those of sequences one by one."""
    if isinstance(part, list):
        for item in part:
            yield from _rules(item)
    elif isinstance(part, dict):
        yield part
        for value in part.values():
            if isinstance(value, list):
                yield from _rules(value)


def _image_settings(settings: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """The settings that make pixels, each of its type and within bounds."""
    for key in _SWITCHES:
        if settings.get(key) is not None:
            yield key, _require(type(settings[key]) is bool, settings, key, file, "true or false")
    for key in ("size", "crop_size"):
        if settings.get(key) is not None:
            fine = all(type(n) is int and 1 <= n <= bounds.SIZES["image_size"] for n in _sides(settings[key]))
            wanted = f"pixels, 1 to {bounds.SIZES['image_size']}"
            yield key, _require(fine, settings, key, file, wanted)
    for key, least, most in (("image_mean", 0.0, 255.0), ("image_std", 1e-3, 255.0)):
        if settings.get(key) is not None:
            values = settings[key] if isinstance(settings[key], list) else [settings[key]] * 3
            fine = len(values) == 3 and all(_within(value, least, most) for value in values)
            yield key, _require(fine, settings, key, file, f"three numbers from {least:g} to {most:g}")
    if settings.get("rescale_factor") is not None:
        fine = _within(settings["rescale_factor"], 1e-6, 1.0)
        yield "rescale_factor", _require(fine, settings, "rescale_factor", file, "a number from 1e-06 to 1")
    if settings.get("resample") is not None:
        fine = type(settings["resample"]) is int and 0 <= settings["resample"] <= 5
        yield "resample", _require(fine, settings, "resample", file, "Pillow's number of a filter, 0 to 5")


def _sides(size: Any) -> list[Any]:
    """The numbers of a size: height and width, an edge, or one number for a square."""
    known = ("height", "width", "shortest_edge", "longest_edge")
    if isinstance(size, dict):
        return [value if key in known else None for key, value in size.items() if value is not None] or [None]
    return [size]


def _within(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _require(fine: bool, settings: Mapping[str, Any], key: str, file: Path, wanted: str) -> Any:
    if not fine:
        raise UserError(f"{file}: {key} is {shown(settings[key])}, expected {wanted}")
    return settings[key]
