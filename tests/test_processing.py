"""Images and questions to arrays: equal to transformers' own LlavaProcessor, and clear about bad input."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.images import open_image
from sparsevlm_jax.inputs.processor import PROMPT_END, PROMPT_START, Processor
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.presets import tiny
from tests.hf import CHAT_TEMPLATE, llama_tokenizer, tiny_processor

SIDE = 56
WIDE = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)  # height 40, width 90
SQUARE = np.random.default_rng(1).integers(0, 256, (70, 70, 3), np.uint8)
MARKER = "<image>"


@pytest.fixture(scope="module")
def config() -> LlavaConfig:
    """Of a model with 56-pixel images, 16 tokens each, and the tokenizer of tests/hf.py."""
    return dataclasses.replace(tiny(), image_token_id=llama_tokenizer().convert_tokens_to_ids(MARKER))


@pytest.fixture
def folder(tmp_path):
    return tiny_processor(tmp_path / "model")


@pytest.fixture
def processor(folder, config) -> Processor:
    return load(folder, config)


def load(folder, config) -> Processor:
    processor = Processor.from_pretrained(folder, config)
    assert processor is not None
    return processor


def reference(folder) -> Any:
    """transformers' own processor of the folder, given what it needs to expand the marker itself."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def edit(file, **changes) -> None:
    """Changes entries of a JSON file; None removes one."""
    entries = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


# Against transformers


@pytest.mark.parametrize("legacy", [True, False], ids=["space-after-special", "space-first"])
@pytest.mark.parametrize(
    "question, images",
    [
        ("what is this?", [WIDE]),
        ("compare these.", [WIDE, SQUARE]),
        ("is <image> like<image>?", [WIDE, SQUARE]),
        ("  two  spaces, été\n<image>", [WIDE]),
        ("", [SQUARE]),
    ],
)
def test_inputs_equal_those_of_transformers(folder, config, legacy, question, images):
    edit(folder / "tokenizer_config.json", legacy=legacy)
    processor = load(folder, config)
    prompt = processor.prompt(question, len(images))
    expected = reference(folder)(images=images, text=prompt, return_tensors="np")
    found = processor([images], [question])
    np.testing.assert_array_equal(found.ids[0], expected["input_ids"][0])
    np.testing.assert_array_equal(found.pixel_values, expected["pixel_values"])
    assert found.ids[0].dtype == np.int32 and found.pixel_values.dtype == np.float32
    assert (found.ids[0] == config.image_token_id).sum() == 16 * len(images)


def test_chat_template_equals_that_of_transformers(folder, config):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    content = [{"type": "image", "image": Image.fromarray(WIDE)}, {"type": "text", "text": "what is this?"}]
    expected = reference(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    found = load(folder, config)([[WIDE]], ["what is this?"])
    np.testing.assert_array_equal(found.ids[0], expected["input_ids"][0])
    np.testing.assert_array_equal(found.pixel_values, expected["pixel_values"])


def test_folder_written_by_transformers_5_is_read(folder, config, tmp_path):
    saved = reference(folder)
    saved.chat_template = CHAT_TEMPLATE
    saved.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "preprocessor_config.json").exists()  # nested in processor_config.json since 5.0
    processor = load(tmp_path / "new", config)
    assert processor.chat_template == CHAT_TEMPLATE
    np.testing.assert_array_equal(processor([[WIDE]], ["hi"]).pixel_values, load(folder, config)([[WIDE]], [""])[1])


def test_patch_size_is_not_needed(folder, config):
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert (load(folder, config)([[WIDE]], ["what?"]).ids[0] == config.image_token_id).sum() == 16


def test_neither_torch_nor_jax_is_needed(folder, config):
    program = f"""
import sys, types
package = types.ModuleType("sparsevlm_jax")  # in place of the real one, which imports jax for its other modules
package.__path__ = [{str(demo_model.photo().parents[1])!r}]
sys.modules.update(sparsevlm_jax=package, jax=None, torch=None, torchvision=None)
from sparsevlm_jax.inputs import processor
from sparsevlm_jax.layout import one_tile
tiny = types.SimpleNamespace(
    image_token_id={config.image_token_id},
    vision=types.SimpleNamespace(image_size=56),
    most_tiles=1,
    packs_images=False,
    video_token_id=None,
    image_layout=lambda size: one_tile(4, 1, 1),
)
processor = processor.Processor.from_pretrained({str(folder)!r}, tiny)
print(processor([[{str(demo_model.photo())!r}]], ["what?"]).pixel_values.shape)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "(1, 3, 56, 56)\n", result.stderr


# Prompts


def test_default_prompt_is_vicunas(processor):
    assert processor.prompt("why?", 1) == f"{PROMPT_START}<image>\nwhy?{PROMPT_END}"
    assert PROMPT_START.startswith("A chat between a curious user and an artificial intelligence assistant. The ")
    assert PROMPT_START.endswith("polite answers to the user's questions. USER: ") and PROMPT_END == " ASSISTANT:"


def test_one_marker_per_image_goes_in_front(processor):
    assert processor.prompt("why?", 2) == f"{PROMPT_START}<image>\n<image>\nwhy?{PROMPT_END}"


def test_text_only_prompt_has_no_marker(processor, config):
    found = processor([[]], ["why?"])
    assert processor.prompt("why?", 0) == f"{PROMPT_START}why?{PROMPT_END}"
    assert config.image_token_id not in found.ids[0]
    assert found.pixel_values.shape == (0, 3, SIDE, SIDE) and found.pixel_values.dtype == np.float32


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE], ids=["vicuna", "chat-template"])
def test_markers_of_the_question_stay_where_they_are(processor, config, template):
    processor = Processor(processor.tokenizer, processor.image_processor, template, config)
    assert "USER: first <image> then <image>?" in processor.prompt("first <image> then <image>?", 2)


@pytest.mark.parametrize(
    "question, count, words",
    [
        ("<image> or <image>?", 1, "2 <image> markers, but 1 image came"),
        ("<image>?", 2, "1 <image> marker, but 2 images came"),
        ("<image>?", 0, "1 <image> marker, but 0 images came"),
    ],
)
def test_marker_count_other_than_images_is_an_error(processor, question, count, words):
    with pytest.raises(UserError, match=words):
        processor([[SQUARE] * count], [question])


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + CHAT_TEMPLATE], ids=["vicuna", "bos-in-template"])
def test_bos_comes_exactly_once(processor, config, template):
    ids = Processor(processor.tokenizer, processor.image_processor, template, config)([[SQUARE]], ["why?"]).ids[0]
    assert ids[0] == processor.tokenizer.bos_token_id
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1


def test_template_of_a_language_model_gets_one_string(processor, config):
    template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
    text = Processor(processor.tokenizer, processor.image_processor, template, config).prompt("why?", 2)
    assert text == "[user] <image>\n<image>\nwhy?"


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "hello"])
def test_useless_chat_template_is_an_error(folder, config, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="model: the chat template"):
        Processor.from_pretrained(folder, config)


def test_template_that_drops_markers_is_an_error(processor, config):
    template = "{{ messages[0]['content'] | replace('<image>', '') }}"
    with pytest.raises(UserError, match="0 <image> tokens for 1 image"):
        Processor(processor.tokenizer, processor.image_processor, template, config)([[SQUARE]], ["why?"])


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
def test_chat_template_is_found_in_older_places(folder, config, name):
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder / name, chat_template=CHAT_TEMPLATE)
    assert load(folder, config).prompt("why?", 1) == "USER: <image>\nwhy? ASSISTANT:"


def test_decode_leaves_out_special_tokens_and_unused_ids(processor, config):
    text = processor.tokenizer("hello there", add_special_tokens=False)["input_ids"]
    assert processor.decode([1, *text, config.image_token_id, 2, 300_000]) == "hello there"


# Folders


def test_folder_without_processor_files_gives_none(tmp_path, config):
    (tmp_path / "config.json").write_text("{}")
    assert Processor.from_pretrained(tmp_path, config) is None


@pytest.mark.parametrize("kind", ["CLIPImageProcessorFast", "CLIPFeatureExtractor", None])
def test_image_processor_runs_on_pillow_whatever_its_name(folder, processor, config, kind):
    edit(folder / "preprocessor_config.json", image_processor_type=kind)
    other = load(folder, config)
    assert type(other.image_processor).__name__ == "CLIPImageProcessorPil"
    np.testing.assert_array_equal(other([[WIDE]], ["?"]).pixel_values, processor([[WIDE]], ["?"]).pixel_values)


def test_unknown_image_processor_is_an_error(folder, config):
    edit(folder / "preprocessor_config.json", image_processor_type="MadeUpImageProcessor")
    with pytest.raises(UserError, match='"MadeUpImageProcessor" is none of CLIPImageProcessor, LlavaImageProcessor'):
        Processor.from_pretrained(folder, config)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [None, "{ broken"], ids=["missing", "broken"])
def test_incomplete_or_broken_folder_is_an_error(folder, config, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match="model.*(half|cannot be loaded|cannot be read as JSON)"):
        Processor.from_pretrained(folder, config)


def test_tokenizer_of_another_model_is_an_error(folder, config):
    with pytest.raises(UserError, match="image_token_index is 5"):
        Processor.from_pretrained(folder, dataclasses.replace(config, image_token_id=5))


# Shapes


def test_pad_fills_up_with_the_mean_colour(processor):
    pixels = processor([[np.full((40, 80, 3), 255, np.uint8)]], ["?"], aspect="pad").pixel_values[0]
    mean, std = (
        np.array(value) for value in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    border = ((255 * mean).astype(int) / 255 - mean) / std
    np.testing.assert_allclose(pixels[:, 0, 0], border, atol=1e-5)
    np.testing.assert_allclose(pixels[:, SIDE // 2, SIDE // 2], (1 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(pixels[:, -1, -1], border, atol=1e-5)


def test_crop_keeps_the_middle(processor):
    image = np.zeros((56, 168, 3), np.uint8)
    image[:, 56:112] = WIDE[:1, :1]
    middle = processor([[image[:, 56:112]]], ["?"]).pixel_values
    np.testing.assert_array_equal(processor([[image]], ["?"], aspect="crop").pixel_values, middle)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_no_aspect_is_the_choice_of_the_checkpoint(folder, config, aspect):
    edit(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=aspect == "pad")
    processor = load(folder, config)
    own, chosen = (processor([[WIDE]], ["?"], aspect=choice).pixel_values for choice in (None, aspect))
    np.testing.assert_array_equal(own, chosen)


def test_crop_and_pad_overrule_the_checkpoint(folder, processor, config):
    edit(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    padding = load(folder, config)
    for aspect in ("crop", "pad"):
        own, other = (each([[WIDE]], ["?"], aspect=aspect).pixel_values for each in (processor, padding))
        np.testing.assert_array_equal(own, other)


def test_unknown_aspect_is_an_error(processor):
    with pytest.raises(UserError, match='aspect is "stretch"'):
        processor([[SQUARE]], ["?"], aspect="stretch")


def test_processor_of_another_size_is_an_error(folder, config):
    edit(folder / "preprocessor_config.json", crop_size={"height": 48, "width": 48})
    with pytest.raises(UserError, match=r"makes \[3, 48, 48\], but the model takes \[3, 56, 56\]"):
        load(folder, config)([[SQUARE]], ["?"])


@pytest.mark.parametrize("aspect, shape", [(None, (1, 60_000, 3)), ("crop", (60_000, 1, 3)), ("pad", (1, 60_000, 3))])
def test_image_that_would_grow_without_bound_is_an_error(processor, aspect, shape):
    with pytest.raises(UserError, match="too large or too narrow"):
        processor([[np.zeros(shape, np.uint8)]], ["?"], aspect=aspect)


def test_padding_checkpoint_does_not_grow_a_image_without_bound(folder, config):
    edit(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    with pytest.raises(UserError, match="too large or too narrow"):
        load(folder, config)([[np.zeros((20, 20_000, 3), np.uint8)]], ["?"])


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 3), (2, 300, 3)])
@pytest.mark.parametrize("aspect", [None, "crop", "pad"])
def test_tiny_images_work(processor, shape, aspect):
    assert processor([[np.zeros(shape, np.uint8)]], ["?"], aspect=aspect).pixel_values.shape == (1, 3, SIDE, SIDE)


def test_rows_share_one_array_of_images_in_order(processor):
    found = processor([[WIDE], [], [SQUARE, WIDE]], ["a", "b", "c"]).pixel_values
    alone = [processor([[image]], ["?"]).pixel_values for image in (WIDE, SQUARE, WIDE)]
    np.testing.assert_array_equal(found, np.concatenate(alone))


def test_other_number_of_questions_is_an_error(processor):
    with pytest.raises(UserError, match="2 lists of images for 1 questions"):
        processor([[], []], ["?"])


# Images


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(WIDE).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(WIDE, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (1, 1, 1, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "L":  # one shade of grey stands for transparent
        image.convert("L").save(tmp_path / "image.png", transparency=1)
    else:
        (image.quantize() if mode == "P" else image.convert(mode)).save(tmp_path / "image.png")
    opened = open_image(tmp_path / "image.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (0, 0, 0) and opened.getpixel((3, 0)) == (255, 255, 255)


def test_half_transparency_is_blended_with_white():
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode, colour", [("L", 200), ("1", 1), ("CMYK", (0, 55, 55, 55)), ("P", 3), ("YCbCr", 128)])
def test_other_modes_become_rgb(tmp_path, mode, colour):
    image = Image.new(mode, (5, 4), colour)
    file = tmp_path / ("image.tiff" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(file)
    opened = open_image(file)
    assert opened.mode == "RGB" and opened.size == (5, 4)
    assert opened.getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_16_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 257, 25_700, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", values, Image.fromarray(values.astype(np.int32))):
        assert [pixel[0] for pixel in np.asarray(open_image(source))[0]] == [0, 1, 100, 255]


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)])
def test_pixels_without_a_range_are_an_error(values):
    with pytest.raises(UserError, match="no defined range"):
        open_image(Image.fromarray(values))


@pytest.mark.parametrize(
    "shape, dtype", [((4, 4, 3), int), ((4, 4, 2), np.uint8), ((4,), np.uint8), ((0, 4, 3), np.uint8)]
)
def test_other_arrays_are_an_error(shape, dtype):
    with pytest.raises(UserError, match="expected uint8"):
        open_image(np.zeros(shape, dtype))


def test_grey_array_is_a_image():
    assert open_image(np.full((2, 3), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff"])
def test_truncated_image_is_an_error(tmp_path, suffix):
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(SQUARE).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cut.{suffix}: (damaged|not an image)"):
        open_image(file)


@pytest.mark.parametrize("content", [b"", b"hello, I am no image", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image_is_an_error(tmp_path, content):
    (tmp_path / "text.png").write_bytes(content)
    with pytest.raises(UserError, match="text.png: (not an image|damaged)"):
        open_image(tmp_path / "text.png")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere.png: no such file"):
        open_image(str(tmp_path / "nowhere.png"))


def test_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["pillow-warns", "pillow-raises"])
def test_decompression_bomb_is_an_error(tmp_path, side):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(UserError, match="bomb.png: has more pixels than"):
        open_image(tmp_path / "bomb.png")
