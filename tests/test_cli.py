"""The command: what it prints where, its exit codes, and what it says about bad input."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sparsevlm_jax
from sparsevlm_jax.cli import main, options, waiting
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.pruning.methods import METHODS
from tests.hf import tiny_llava
from tests.videos import noise, write_video

PHOTO = str(demo_model.photo())
VISUAL = 36  # visual tokens of an image in the model below
SUMMARY = re.compile(
    r"sparsevlm: v1\.5: 36 > 12 visual tokens \(\d+\.\d equivalent, \d+\.\d entering a layer on average\); "
    r"prefill \d+\.\d{3} s, \d+ decoding steps \d+\.\d{3} s, compile \d+\.\d s on \w+"
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Halves the time of this file, which is mostly XLA optimising programs that run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pruning layer, images of 6 × 6 patches."""
    return tiny_llava(tmp_path_factory.mktemp("models") / "small", layers=2, hidden=32, ffn=48, image_size=84)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; tests/conftest.py has set the compilation cache, which it then leaves alone."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # so that the command's own setting does not outlive the test
    monkeypatch.setattr(waiting, "PATIENCE", 1e6)  # on a slow day a line about compiling would come between

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sparsevlm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert isinstance(stop.value.code, int)
        printed = capsys.readouterr()
        return Result(stop.value.code, printed.out, printed.err)

    return call


@pytest.fixture
def ask(run: Run, model: Path) -> Run:
    """Asks the small model one question about the photograph, with further options."""
    return lambda *options: run(
        "ask", "--model", model, "--image", PHOTO, "--question", "What is this?", "--max-new-tokens", 6, *options
    )


def spawn(*arguments: object) -> subprocess.Popen[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "sparsevlm_jax", *map(str, arguments)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def succeeded(result: Result) -> Any:
    """The JSON that a run has printed."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def error_of(result: Result) -> str:
    """The one line that a run has left after bad input."""
    assert (result.code, result.out) == (2, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sparsevlm: error: "), result.err
    return lines[0]


def write_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What `ask` prints


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("keep=0: at least 1", "--keep 0: at least 1"),
        ("keep_at=(2, -5): layers count from 0", "--keep-at 2:-5: layers count from 0"),
        ('method="v3": expected one of dense', '--method "v3": expected one of dense'),
        ("`flops_share` and `dtype` float32", "--flops-share and --dtype float32"),
        ("load it unchecked (check=False)", "load it unchecked (--no-check)"),
        ("ratio=2: a share in (0, 1]; `<image>` and keep stay", "ratio=2: a share in (0, 1]; `<image>` and keep stay"),
    ],
)
def test_the_librarys_settings_are_options_on_the_command_line(said: str, shown: str) -> None:
    assert options.as_flags(said) == shown


def test_ask_prints_the_answer_on_stdout_and_one_summary_line_on_stderr(ask):
    result = ask()
    assert result.code == 0
    assert result.out.strip()
    assert SUMMARY.fullmatch(result.err.rstrip("\n"))


def test_json_holds_the_answer_and_all_of_the_summary(ask):
    report = succeeded(ask("--json"))
    assert report["answers"] == [ask().out.removesuffix("\n")]
    assert len(report["tokens"][0]) == 6 and report["decode_steps"] == 5
    assert (report["model"], report["method"], report["backend"]) == ("small", "v1.5", "cpu")
    assert [(s["layers"], s["entering"], s["standing"]) for s in report["plan"]["stages"]] == [
        ([0, 0], VISUAL, 12),
        ([1, 1], 12, 12),
    ]
    assert (report["plan"]["equivalent_tokens"], report["plan"]["entering_tokens"]) == (12.0, 24.0)
    assert all(report[f"{part}_seconds"] >= 0 for part in ("compile", "prefill", "decode"))


def test_streamed_answer_equals_the_whole_one(ask):
    streamed, whole = ask("--stream"), ask()
    assert streamed.out == whole.out
    assert SUMMARY.fullmatch(streamed.err.rstrip("\n"))


def test_question_without_image_is_answered(run, model):
    result = run("ask", "--model", model, "--question", "Is the sky blue?", "--max-new-tokens", 4)
    assert result.code == 0 and result.out.strip()
    assert result.err.startswith("sparsevlm: text only, nothing to prune; prefill ")


def test_several_images_go_into_one_prompt(ask):
    report = succeeded(ask("--image", PHOTO, "--method", "dense", "--max-new-tokens", 1, "--json"))
    assert report["plan"]["stages"][0]["entering"] == 2 * VISUAL


def test_seed_decides_what_is_sampled(ask):
    first, again, other = (ask("--method", "dense", "--temperature", 5, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_embedded_model_is_the_default(run):
    sample = demo_model.samples()[0]
    question, truth = sample.questions[0]
    result = run("ask", "--image", sample.image, "--question", question)
    assert (result.code, result.out) == (0, f"{truth}\n")
    assert result.err.startswith("sparsevlm: v1.5: 196 > ")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_a_batch(ask, method):
    own = {"dense": [], "v1": ["--scale", 0.1, "--bias", 2], "v2.0": ["--heads", 2, "--keep", 25]}
    settings = own.get(method, ["--keep", 25])
    batch = ["--question", "Where is the dog?", "--max-new-tokens", 1, "--json"]
    report = succeeded(ask("--method", method, *settings, *batch))
    assert report["method"] == method
    assert len(report["answers"]) == len(report["tokens"]) == 2
    # What v1 reports is the most that any rank can ask for.
    assert (report["plan"]["equivalent_tokens"] == VISUAL) == (method in ("dense", "v1"))


def test_plain_answers_of_a_batch_come_in_the_order_of_the_questions(ask):
    batch = ["--question", "Where is the dog?", "--method", "dense", "--max-new-tokens", 1]
    report = succeeded(ask(*batch, "--json"))
    assert ask(*batch).out == "\n".join(report["answers"]) + "\n"


# Bad input to `ask`


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "v3"], '"v3": expected one of dense, v1, v1.5, v2.0,'),
        (["--keep", 0], "--keep 0: at least 1"),
        (["--keep", VISUAL + 1], f"--keep {VISUAL + 1}: the prompt has only {VISUAL} visual tokens"),
        (["--keep", 1], "--keep 1: not possible"),
        (["--keep", "ten"], "--keep"),
        (["--flops-share", 0.01], "--flops-share 0.01: not possible"),
        (["--flops-share", 1.5], "--flops-share 1.5: a share in"),
        (["--cache-bytes", 10], "--cache-bytes 10: not possible"),
        (["--keep", 10, "--keep-at", "1:10"], "--keep and --keep-at are different budgets"),
        (["--keep-at", "2:300:1"], '--keep-at "2:300:1": expected LAYER:COUNT'),
        (["--keep-at", "1-10"], '--keep-at "1-10": expected LAYER:COUNT'),
        (["--keep-at", ""], '--keep-at "": expected LAYER:COUNT'),
        (["--keep-at", "0:20,2:10"], "layer 2: the decoder has layers 0 to 1"),
        (["--keep-at", "1:10,0:20"], "ascending"),
        (["--method", "v1", "--keep", 100], "for anything else set --scale and --bias"),
        (["--method", "v1"], "no budget: v1 knows"),
        (["--method", "v1", "--scale", "nan", "--bias", 0], "--scale nan"),
        (["--method", "v1", "--scale", 1e300, "--bias", 0], "--scale 1e+300"),
        (["--method", "dense", "--keep", 3], "dense takes no --keep"),
        (["--keep-at", "-1:20"], "scores by attention, there is none before the first layer"),
        (["--heads", 2], "--heads belongs to --method v2.0"),
        (["--temperature", "nan"], "temperature nan must"),
        (["--scale", 1], "--scale belongs to --method v1"),
        (["--method", "v2.0", "--heads", 5], "5 heads, the decoder has 4"),
        (["--method", "v2.0", "--heads", 0], "--heads"),
        (["--dtype", "int8"], '"int8" is not supported: choose float32, bfloat16, float16'),
        (["--aspect", "stretch"], '"stretch": expected pad or crop'),
        (["--top-p", 0], "top_p 0.0 must be in (0, 1]"),
        (["--temperature", -1], "temperature -1.0 must"),
        (["--seed", -1], "--seed"),
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--max-new-tokens", 5000], "more than the model's context of 2048"),
        (["--stream", "--json"], "--stream prints one answer as text"),
        (["--stream", "--question", "And this?"], "--stream prints one answer as text"),
        (["--question", "<image> or <image>?"], "2 <image> markers, but 1 image came"),
        (["--question", "caf\udce9?"], "--question: not text"),
        (["--image", "no-such.png"], "no-such.png: no such file"),
        (["--image", __file__], "test_cli.py: not an image"),
        (["--revision", "main"], 'a revision ("main") can be chosen of a hub id only'),
        (["--model", "a" * 300], ": cannot be looked up: File name too long"),
        (["--model", "~nosuchuser/x"], "~nosuchuser/x': cannot be the name of a file"),
        (["--model", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--model", "nobody/nothing"], "nobody/nothing: not a folder, not complete in the hub's cache"),
        (["--bogus"], "--bogus"),
        (["extra"], "extra"),
    ],
    ids=lambda value: " ".join(map(repr, value))[:60] if isinstance(value, list) else "",
)
def test_bad_option_is_one_line_and_exit_code_2(ask, options, message):
    assert message in error_of(ask(*options))


def test_missing_question_is_an_error(run):
    error = error_of(run("ask", "--image", PHOTO))
    assert "--question" in error and "--help" in error


def test_unknown_command_is_an_error(run):
    assert "reply" in error_of(run("reply"))


def test_decompression_bomb_is_an_error(ask, tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    assert "bomb.png: has more pixels than" in error_of(ask("--image", tmp_path / "bomb.png"))


def test_bad_image_is_found_before_the_model_is_loaded(ask, monkeypatch):
    monkeypatch.setattr(options, "load", lambda *_, **__: pytest.fail("loads the model"))
    assert "no such file" in error_of(ask("--image", "no-such.png"))


def test_truncated_weights_are_an_error(ask, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: truncated" in error_of(ask("--model", broken))


def test_nan_in_the_weights_is_an_error(ask, broken):
    weights = load_file(broken / "model.safetensors")
    weights["language_model.lm_head.weight"][3, 4] = np.nan
    save_file(weights, broken / "model.safetensors")
    error = error_of(ask("--model", broken))
    assert "NaN" in error and "language_model.lm_head.weight" in error


def test_missing_tensor_is_an_error(ask, broken):
    weights = load_file(broken / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, broken / "model.safetensors")
    assert "language_model.lm_head.weight" in error_of(ask("--model", broken))


def test_another_architecture_is_an_error(ask, broken):
    write_json(broken / "config.json", model_type="qwen2_vl")
    assert 'model_type is "qwen2_vl", expected one of "llava", ' in error_of(ask("--model", broken))


def test_checkpoint_without_processor_cannot_be_asked(ask, broken):
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (broken / name).unlink()
    assert "no tokenizer and processor files" in error_of(ask("--model", broken))


def test_image_markers_that_a_template_adds_are_an_error(ask, broken):
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'] }} <image>")
    assert "2 <image> tokens for 1 image" in error_of(ask("--model", broken))


# `plan`


def test_plan_shows_the_published_schedule_of_7b(run):
    result = run("plan", "--model", "llava-1.5-7b", "--method", "v1.5", "--keep", 192)
    assert result.code == 0 and result.err == ""
    rows = [re.findall(r"[\d-]+(?: to \d+)?", line) for line in result.out.splitlines() if " to " in line]
    assert rows == [
        ["0 to 2", "576", "300", "9", "309"],
        ["3 to 6", "309", "200", "4", "204"],
        ["7 to 15", "204", "110", "3", "113"],
        ["16 to 31", "113", "-", "-", "113"],
    ]
    assert "192.03 of 576" in result.out and "206.50 of 576" in result.out
    cuts = [float(cut) for cut in re.findall(r"FLOPs.*dense.*?([\d.]+)% less", result.out)]
    assert len(cuts) == 2 and min(cuts) >= 53


def test_plan_as_json_compares_with_dense(run, model):
    report = succeeded(run("plan", "--model", model, "--method", "random", "--keep", 25, "--json"))
    dense, pruned = report["dense"], report["pruned"]
    assert (report["method"], report["text_tokens"]) == ("random", 118)
    assert dense["equivalent_tokens"] == VISUAL and pruned["equivalent_tokens"] == 25
    for cost in ("paper_flops", "xla_flops", "cache_bytes"):
        assert 0 < pruned[cost] < dense[cost]
    assert report["tower_xla_flops"] > 0
    assert pruned["counts_are_upper_bounds"] is False


def test_plan_needs_no_weights(run, broken):
    (broken / "model.safetensors").unlink()
    assert run("plan", "--model", broken).code == 0


def test_plan_takes_layers_and_counts(run, model):
    report = succeeded(run("plan", "--model", model, "--method", "uniform", "--keep-at", "-1:20,0:10", "--json"))
    assert [(s["entering"], s["kept"]) for s in report["pruned"]["stages"]] == [(VISUAL, 20), (20, 10), (10, None)]


def test_plan_counts_images_and_text(run, model):
    report = succeeded(run("plan", "--model", model, "--images", 3, "--text-tokens", 7, "--json"))
    assert report["dense"]["entering_tokens"] == 3 * VISUAL
    keys_and_values, layers, width, itemsize = 2, 2, 32, 2
    assert report["dense"]["cache_bytes"] == keys_and_values * layers * (3 * VISUAL + 7) * width * itemsize


def test_plan_of_tiles_follows_the_size_of_the_image(run, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = {
        "model_type": "llava_next",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
        "vision_config": {"model_type": "clip_vision_model", **sizes, "image_size": 56, "patch_size": 14},
        "text_config": {"model_type": "llama", **sizes, "vocab_size": 64},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    arguments = ("plan", "--model", file, "--method", "uniform", "--keep", 20, "--json")
    square, wide = (succeeded(run(*arguments, "--image-size", size)) for size in ("112x112", "30x150"))
    assert [report["dense"]["entering_tokens"] for report in (square, wide)] == [16 + 64 + 8, 16 + 26]
    assert [report["pruned"]["equivalent_tokens"] for report in (square, wide)] == pytest.approx([20, 20], abs=0.6)
    assert square["tower_xla_flops"] == wide["tower_xla_flops"]  # five tiles run either way


def test_plan_says_that_v1_counts_are_upper_bounds(run, model):
    assert "All counts are upper bounds" in run("plan", "--model", model, "--method", "v1", "--keep", 64).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llava-2"], "neither a folder nor one of llava-1.5-7b, llava-1.5-13b, llava-next-7b, "),
        (["--model", "llava-next-7b"], "an image of llava_next becomes depends on its size: give height and width"),
        (["--model", "llava-next-7b", "--image-size", "672"], "--image-size 672: expected height and width in pixels"),
        (["--model", "llava-next-7b", "--image-size", "0x9"], "--image-size 0x9: expected height and width in pixels"),
        (["--model", "llava-next-7b", "--image-size", "999999x999999"], "--image-size 999999x999999: has more pixels"),
        (["--model", "llava-next-7b", "--image-size", "336x336", "--method", "pool"], "pool: shrinks images that are"),
        ([], "--model"),
        (["--model", "tiny", "--images", 0], "--images"),
        (["--model", "tiny", "--text-tokens", 0], "--text-tokens"),
        (["--model", "tiny", "--method", "v1", "--keep", 100], "set --scale and --bias"),
        (["--model", "tiny", "--keep", 577], "--keep 577: the prompt has only 16 visual tokens"),
        (["--model", "llava-1.5-7b", "--keep", 35], "--keep 35: not possible with pruning after layers 2, 6, 15 of 32"),
        (["--model", __file__], "cannot be read as JSON"),
        (["--model", "tiny", "--text-tokens", 10**9], "--text-tokens"),
        (["--model", "tiny", "--images", "9" * 30], "--images"),
        (["--model", "a" * 5000], "File name too long"),
        (["--model", "~nosuchuser/x"], "cannot be the name of a file"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else "",
)
def test_bad_option_of_plan_is_one_line_and_exit_code_2(run, options, message):
    assert message in error_of(run("plan", *options))


# The command as a whole


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_help_lists_the_commands(run, arguments):
    result = run(*arguments)
    assert result.code == 0 and result.err == ""
    assert re.search(r"^  ask .*\n  plan ", result.out, re.MULTILINE)


def test_short_help_belongs_to_every_command(run):
    assert run("ask", "-h") == run("ask", "--help")
    assert run("plan", "-h").code == 0


def test_version_is_the_packages(run):
    assert run("--version") == (0, f"sparsevlm {sparsevlm_jax.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparsevlm_jax.__version__)
    assert metadata.version("sparsevlm_jax") == sparsevlm_jax.__version__


def test_help_of_ask_names_every_method(run):
    text = " ".join(run("ask", "--help").out.split())
    assert ", ".join(METHODS) in text


def test_compiled_programs_are_kept_in_the_users_cache_folder(run, monkeypatch, tmp_path):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run("--help")
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "sparsevlm_jax" / "xla")


def test_users_own_compilation_cache_is_left_alone(run, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    run("--help")
    assert not settings


def test_without_a_home_nothing_is_cached(run, monkeypatch):
    """As in a container whose user has no entry in passwd."""

    def no_entry(*_):
        raise KeyError("no such user")

    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert run("--help").code == 0
    assert not settings


@pytest.mark.parametrize(
    ("platforms", "message"),
    [
        ("cuda", "JAX_PLATFORMS=cuda: jax has no such backend here; install it"),
        (None, "jax finds no device: Unable to initialize backend"),
    ],
)
def test_a_backend_that_is_not_there_is_one_line(ask, monkeypatch, platforms, message):
    def unable(*_, **__):
        raise RuntimeError("Unable to initialize backend\nand more of it")

    monkeypatch.setattr(jax, "devices", unable)
    monkeypatch.setattr(options, "load", unable)
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert message in error_of(ask())


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "--question", "hi", "--model", "\x1b[31mred"],
        ["ask", "--question", "hi", "--image", "\x1b]0;title\x07.png"],
        ["plan", "--model", "tiny", "--keep-at", "\x1b[2J"],
        ["plan", "--\x9b31m"],
        ["\u202edlrow"],
    ],
)
def test_terminal_escapes_are_written_out(run, arguments):
    error = error_of(run(*arguments))
    assert error.isprintable()
    assert re.search(r"\\(x1b|x9b|u202e)", error)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_an_answer_that_overflows_is_an_error_and_not_printed(ask, broken, stream):
    weights = load_file(broken / "model.safetensors")
    weights["language_model.model.layers.0.mlp.down_proj.weight"][:] = 6e4
    save_file(weights, broken / "model.safetensors")
    error = error_of(ask("--model", broken, "--dtype", "float16", *stream))
    assert "the logits are not finite" in error and "--dtype bfloat16 or float32" in error


def test_interrupting_leaves_no_traceback(ask, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load", interrupted)
    assert ask() == (130, "", "")


def test_a_bug_keeps_its_traceback(ask, monkeypatch):
    def buggy(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(options, "load", buggy)
    with pytest.raises(RuntimeError, match="a bug"):
        ask()


def test_python_m_prints_what_the_command_prints(ask, model):
    question = ["--image", PHOTO, "--question", "What is this?", "--max-new-tokens", 6]
    process = spawn("ask", "--model", model, *question)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ask().out)
    *notes, summary = err.splitlines()
    assert SUMMARY.fullmatch(summary)
    assert all(note.startswith("sparsevlm: compiling for") for note in notes)  # as it may have to


def test_prompt_above_the_largest_bucket_is_one_line_from_all_libraries_together(broken):
    config = json.loads((broken / "config.json").read_text())
    write_json(broken / "config.json", text_config=config["text_config"] | {"max_position_embeddings": 9000})
    process = spawn("ask", "--model", broken, "--question", "dog " * 1200)
    out, err = process.communicate(timeout=120)
    assert "the largest bucket 4096" in error_of(Result(process.returncode, out, err))


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_behind_stdout_is_one_line(buffered):
    with open("/dev/full", "w") as full:
        command = [sys.executable, *([] if buffered else ["-u"]), "-m", "sparsevlm_jax", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    error = error_of(Result(done.returncode, "", done.stderr))
    assert error.endswith("stdout cannot be written: No space left on device")


def test_a_closed_stdout_is_one_line(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert "stdout is closed" in error_of(run("--help"))


def test_a_closed_stderr_leaves_stdout_to_the_answer(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert run("plan", "--model", "no-such-model") == (2, "", "")


@pytest.mark.parametrize("command", ["plan", "ask"])
def test_reader_that_goes_away_leaves_no_traceback(model, command):
    streaming = ["--question", "Why?", "--max-new-tokens", 4, "--stream"]
    with spawn(command, "--model", model, *(streaming if command == "ask" else ["--json"])) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert all(line.startswith("sparsevlm: ") for line in err.splitlines())


def test_the_plan_of_eight_frames_needs_no_weights(run: Run) -> None:
    plan = ("plan", "--model", "video-llava-7b", "--text-tokens", 60, "--method", "dense", "--json")
    report = succeeded(run(*plan, "--video-frames", 8))
    assert report["dense"]["stages"][0]["entering"] == 2056
    assert round(report["dense"]["paper_flops"] / 1e12, 2) == 14.88
    # 257 tokens of each frame through 23 layers of width 1024, and the projector.
    assert 160e9 < report["tower_xla_flops"] / 8 < 175e9
    both = succeeded(run(*plan, "--video-frames", 8, "--images", 2))
    assert both["dense"]["stages"][0]["entering"] == 2056 + 2 * 256
    assert both["tower_xla_flops"] > report["tower_xla_flops"]
    assert "llava: takes images only, no videos" in error_of(run("plan", "--model", "tiny", "--video-frames", 8))


def test_ask_answers_about_a_video(tmp_path: Path, run: Run) -> None:
    model = tiny_llava(tmp_path / "model", family="video_llava", layers=2)
    file = write_video(tmp_path / "clip.mkv", noise(12, 60, 70))
    ask = ("ask", "--model", model, "--question", "where", "--json", "--max-new-tokens", 2, "--method", "dense")
    report = succeeded(run(*ask, "--video", file, "--frames", 3, "--sampling", "arange"))
    assert report["visual_tokens"] == [[3 * 17]]
    settings = {"frames": 3, "sampling": "arange", "sparsity": "dense", "max_new_tokens": 2}
    assert report["answers"] == [
        sparsevlm_jax.generate(sparsevlm_jax.load(model), None, "where", videos=str(file), **settings)
    ]
    assert "missing.mp4: no such file" in error_of(run(*ask, "--video", tmp_path / "missing.mp4"))
    assert "--sampling" in error_of(run(*ask, "--video", file, "--sampling", "uniform"))


def test_layers_are_spelt_on_the_command_line(run: Run) -> None:
    """With v1's own options they are `Sparsity.video()`."""
    about = ("plan", "--model", "video-llava-7b", "--video-frames", 8, "--text-tokens", 60, "--json")
    report = succeeded(run(*about, "--method", "v1", "--scale", 1, "--bias", 0, "--layers", 1))
    video = sparsevlm_jax.Sparsity.video(), sparsevlm_jax.PRESETS["video-llava-7b"](), 2056, 60
    expected = sparsevlm_jax.make_plan(*video)
    assert report["pruned"]["entering_tokens"] == expected.entering_tokens()
    assert [stage["layers"] for stage in report["pruned"]["stages"]] == [[0, 1], [2, 31]]
    for arguments, said in (
        (("--layers", "one"), '--layers "one": expected L,L,... as in 2,6,15'),
        (("--layers", "1", "--keep-at", "2:9"), "--keep-at names its layers itself: leave --layers out"),
        (("--layers", "1", "--method", "dense"), "--layers: dense prunes after no layer"),
        (("--layers", "40"), "pruning layer 40: the decoder has layers 0 to 31"),
    ):
        assert said in error_of(run(*about, *arguments))
