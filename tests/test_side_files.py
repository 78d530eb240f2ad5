"""Files beside the weights: only what belongs to the checkpoint is read, and nothing in it is run."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

from sparsevlm_jax import bounds
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside
from sparsevlm_jax.inputs import templates
from sparsevlm_jax.inputs.images import open_image
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.presets import tiny
from tests.hf import CHAT_TEMPLATE, llama_tokenizer, tiny_processor

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.fixture(scope="module")
def config() -> LlavaConfig:
    return dataclasses.replace(tiny(), image_token_id=llama_tokenizer().convert_tokens_to_ids("<image>"))


@pytest.fixture
def folder(tmp_path):
    return tiny_processor(tmp_path / "model")


def edit(file, **changes) -> None:
    entries = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(entries | changes))


def refused(folder, config) -> str:
    with pytest.raises(UserError) as raised:
        Processor.from_pretrained(folder, config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Code and classes.


@pytest.fixture
def trap(folder, monkeypatch):
    """A Python file in the checkpoint, and nobody to ask whether it may run."""
    (folder / "trap.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    yield {"AutoImageProcessor": "trap.A", "AutoTokenizer": ["trap.A", "trap.A"], "AutoProcessor": "trap.A"}
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "kind", ["CLIPModel", "AutoImageProcessor", "LlavaForConditionalGeneration", "pipeline", 3, ["x"]]
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_no_other_class_is_an_image_processor(folder, config, trap, kind, name):
    settings = {"image_processor_type": kind, "auto_map": trap}
    edit(folder / name, **(settings if name == "preprocessor_config.json" else {"image_processor": settings}))
    assert "is none of CLIPImageProcessor, LlavaImageProcessor" in refused(folder, config)


@pytest.mark.parametrize("kind", ["AutoTokenizer", "LlamaForCausalLM", "ByT5Tokenizer", "MadeUp", 3, ["x"]])
def test_no_other_class_is_a_tokenizer(folder, config, trap, kind):
    edit(folder / "tokenizer_config.json", tokenizer_class=kind, auto_map=trap)
    assert f"{folder}/tokenizer_config.json: the tokenizer class" in refused(folder, config)


def test_code_that_a_checkpoint_names_is_never_run(folder, config, trap):
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "config.json"):
        edit(folder / name, auto_map=trap)
    processor = Processor.from_pretrained(folder, config)
    assert processor is not None
    assert processor([[COLOURS]], ["why?"]).pixel_values.shape == (1, 3, 56, 56)


def test_a_tokenizer_config_cannot_name_files(folder, config, tmp_path):
    (tmp_path / "secret.json").write_text((folder / "tokenizer.json").read_text())
    files = {"vocab_file": "../secret.json", "gguf_file": "../secret.json", "tokenizer_file": "../secret.json"}
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.1.json"], **files)
    assert Processor.from_pretrained(folder, config) is not None


def test_a_processor_can_be_pickled_after_its_copies_are_gone(folder, config):
    processor = pickle.loads(pickle.dumps(Processor.from_pretrained(folder, config)))
    assert processor.tokenizer.name_or_path == str(folder)
    assert processor([[COLOURS]], ["why?"]).ids[0].size


# Links, pipes, pointers.

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip


def content(name: str) -> str:
    return CHAT_TEMPLATE if name.endswith(".jinja") else "{}"


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_link_out_of_the_folder_is_not_followed(folder, config, name):
    file, other = folder / name, folder.parent / "elsewhere"
    other.write_bytes(file.read_bytes() if file.exists() else content(name).encode())
    file.unlink(missing_ok=True)
    file.symlink_to("../elsewhere")
    assert refused(folder, config) == f"{file}: a link that leads out of its folder; copy the file there instead"


def test_links_of_the_hubs_cache_are_followed(folder, config, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert Processor.from_pretrained(snapshot, config) is not None
    (snapshot / "more").symlink_to("../../../model")
    with pytest.raises(UserError, match="leads out of its folder"):
        inside(snapshot, "more")


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_pipe_is_not_read(folder, config, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refused(folder, config) == f"{folder / name}: cannot be read: a pipe, socket or device, not a regular file"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_what_git_lfs_left_is_named(folder, config, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n")
    assert f"{folder / name}: a Git LFS pointer" in refused(folder, config)


# Values.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", [0, 1, 1]),
        ("image_std", [1, 1]),
        ("image_mean", [float("nan")] * 3),
        ("image_mean", "abc"),
        ("rescale_factor", 1e300),
        ("rescale_factor", float("nan")),
        ("rescale_factor", True),
        ("crop_size", {"height": 50_000, "width": 50_000}),
        ("crop_size", 50_000),
        ("size", {"height": 10**6, "width": 10**6}),
        ("size", {"shortest_edge": 0}),
        ("size", {"shortest_edge": 56.5}),
        ("size", {"edge": 56}),
        ("size", []),
        ("resample", 77),
        ("do_resize", "yes"),
    ],
)
def test_a_setting_that_makes_no_pixels_is_named(folder, config, key, value):
    edit(folder / "preprocessor_config.json", **{key: value})
    assert f"{folder}/preprocessor_config.json: {key} is " in refused(folder, config)


@pytest.mark.parametrize("value", ["{}", '"long"', "-1", "NaN", "[]"])
def test_a_model_max_length_that_is_none_is_named(folder, config, value):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "X"}).replace('"X"', value))
    assert f"{file}: model_max_length is " in refused(folder, config)


@pytest.mark.parametrize("template", [3, [1], {"default": 3}, "\ud800"])
@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_a_template_that_is_no_text_is_named(folder, config, name, template):
    edit(folder / name, chat_template=template)
    assert refused(folder, config)


@pytest.mark.parametrize(
    "template", ["{{ 'a'.center(10**10) }}", "{% for i in range(9999) %}" * 9 + "{% endfor %}" * 9]
)
def test_a_template_that_does_not_end_is_an_error(folder, config, template):
    (folder / "chat_template.jinja").write_text(template)
    assert "the chat template" in refused(folder, config)


def test_a_template_that_does_not_end_is_not_tried_twice(folder, config, monkeypatch):
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    tried, render = [], templates.render
    monkeypatch.setattr(templates, "render", lambda source, **given: tried.append(source) or render(source, **given))
    assert "the chat template fails: it makes a value of more than" in refused(folder, config)
    assert len(tried) == 1


def test_a_tokenizer_may_begin_with_a_byte_order_mark(folder, config):
    plain = Processor.from_pretrained(folder, config).tokenizer("a cat")["input_ids"]
    file = folder / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Processor.from_pretrained(folder, config).tokenizer("a cat")["input_ids"] == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no tokenizer: model is None"),
        ("[]", "expected a JSON object, found list"),
        ("", "cannot be read as JSON"),
        ('{"a": ' * 200_000, "nested more than 40 deep"),
        (f'{{"a": {"1" * 5_000}}}', "a number of 5000 digits"),
        ('{"model": {}, "model": {}}', "repeats 'model'"),
    ],
    ids=["empty", "list", "nothing", "deep", "digits", "twice"],
)
def test_what_is_no_tokenizer_is_named(folder, config, content, message):
    (folder / "tokenizer.json").write_text(content)
    error = refused(folder, config)
    assert error.startswith(f"{folder / 'tokenizer.json'}: ") and message in error


def test_rules_that_multiply_a_text_are_refused(folder, config):
    settings = json.loads((folder / "tokenizer.json").read_text())
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    settings["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 40}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert "its normalizer makes a text more than 1000 times as long" in refused(folder, config)


# Images.


@pytest.mark.parametrize(
    "source",
    [
        COLOURS.astype(np.float32) / 255,
        (COLOURS / 255).astype(np.float64),
        jnp.asarray(COLOURS),
        jnp.asarray(COLOURS / 255, jnp.float32),
        COLOURS[::-1][::-1],
    ],
    ids=["float32", "float64", "jax", "jax float32", "strided"],
)
def test_an_array_of_any_library_is_a_image(source):
    np.testing.assert_array_equal(np.asarray(open_image(source)), COLOURS)


def test_a_torch_tensor_is_a_image():
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(np.asarray(open_image(torch.from_numpy(COLOURS.copy()))), COLOURS)


def test_one_channel_is_grey():
    np.testing.assert_array_equal(np.asarray(open_image(COLOURS[:, :, :1])), COLOURS[:, :, [0, 0, 0]])


@pytest.mark.parametrize(
    "values",
    [COLOURS.astype(np.float32), np.full((2, 2), -0.1), np.full((2, 2), np.nan), COLOURS.astype(ml_dtypes.bfloat16)],
    ids=["to 255", "negative", "nan", "bfloat16"],
)
def test_floats_beyond_one_are_an_error_that_says_to_scale(values):
    with pytest.raises(UserError, match="expected 0 to 1: scale it"):
        open_image(values)


@pytest.mark.parametrize("source", [None, b"\x89PNG", (x for x in []), 3, object(), {}])
def test_what_is_no_image_is_named(source):
    with pytest.raises(UserError, match=f"image: {type(source).__name__} is none"):
        open_image(source)


@pytest.mark.parametrize(
    "source",
    [
        "https://example.com/cat.jpg",
        "file:///cat.jpg",
        "data:image/png;base64,AAAA",
        Path("https://example.com/cat.jpg"),  # as the command line has it: of two slashes one is left
        Path("s3://bucket/cat.jpg"),
    ],
)
def test_a_url_is_not_read(source):
    with pytest.raises(UserError, match="a URL, and only files are read"):
        open_image(source)


@pytest.mark.parametrize(
    "name", ["x" * 300, "x/" * 3_000, "a\0b", "\udce4\ud800"], ids=["name", "path", "nul", "surrogate"]
)
def test_a_name_that_cannot_be_is_an_error(name):
    with pytest.raises(UserError, match="cannot be|no such file"):
        open_image(name)


class Unwilling:
    def __array__(self, *args, **kwargs):
        raise TypeError("copy the tensor to host memory first")


@pytest.mark.parametrize("source", [Unwilling(), torch.zeros(4, 4, 3, requires_grad=True)], ids=["device", "gradient"])
def test_an_array_that_cannot_be_taken_is_not_called_damaged(source):
    with pytest.raises(UserError, match=rf"image: {type(source).__name__} cannot be taken as an array: \w+"):
        open_image(source)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_image_without_pixels_is_an_error(size):
    with pytest.raises(UserError, match="image: has no pixels"):
        open_image(Image.new("RGB", size))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(UserError, match="image.png: cannot be read: a pipe"):
        open_image(tmp_path / "image.png")


def test_the_orientation_tag_alone_turns_a_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "wide"
    plain = exif.tobytes()
    data = plain.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")  # the text becomes that of ImageWidth
    assert data != plain
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=data)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_those_of_pillow(orientation):
    from PIL import ImageOps

    image = Image.fromarray(COLOURS)
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(ImageOps.exif_transpose(image)))


def test_opening_images_leaves_the_warning_filters_alone(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "image.png")
    before, barrier = list(warnings.filters), threading.Barrier(8)

    def many(_: int) -> None:
        barrier.wait()
        for _ in range(50):
            open_image(tmp_path / "image.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many, range(8)))
    assert list(warnings.filters) == before


def test_a_image_of_more_pixels_than_the_bound_is_never_decoded(monkeypatch):
    monkeypatch.setattr(bounds, "PIXELS", 34)
    image = Image.fromarray(COLOURS)
    monkeypatch.setattr(image, "convert", lambda *_: pytest.fail("is decoded"))
    for source in (image, COLOURS):
        with pytest.raises(UserError, match="has more pixels than are taken"):
            open_image(source)


@pytest.mark.parametrize("cut", [100, 900], ids=["header", "pixels"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_nothing_is_printed_about_a_damaged_tiff(tmp_path, compression, cut):
    content = io.BytesIO()
    Image.fromarray(np.tile(COLOURS, (9, 9, 1))).save(content, "TIFF", compression=compression)
    data = content.getvalue()
    start = len(data) - cut if cut < 200 else 40
    (tmp_path / "cut.tiff").write_bytes(data[:start] + bytes(range(99)) + data[start + 99 :])
    program = f"""
import sys, types
package = types.ModuleType("sparsevlm_jax")  # in place of the real one, which imports jax
package.__path__ = [{str(demo_model.photo().parents[1])!r}]
sys.modules["sparsevlm_jax"] = package
from sparsevlm_jax import errors
from sparsevlm_jax.inputs import images
images.silence_pillow()
try:
    images.open_image({str(tmp_path / "cut.tiff")!r})
except errors.UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr == "" and len(result.stdout.splitlines()) <= 1
