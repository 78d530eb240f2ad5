"""The model for lmms-eval under its own command line, on local tasks and under its own scorer of POPE."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import sparsevlm_jax as sv
from sparsevlm_jax import UserError
from sparsevlm_jax.data import demo_model
from tests import hf
from tests.evaluate import sets
from tests.integrations.tasks import write_clips, write_tasks
from tests.videos import noise, write_video
from training.heldout import held_out

QUESTIONS, KEEP, NEW = 24, 64, 16
pytestmark = [
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-integrations"),
    pytest.mark.filterwarnings("ignore"),  # of lmms-eval's own modules, when they are imported
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms") / "tasks"
    write_tasks(folder, QUESTIONS)
    return folder


def evaluate(folder: Path, tasks: Path, names: str, arguments: str, *more: object) -> str:
    """Runs lmms-eval; what it said."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    options = ["--model", "sparsevlm_jax", "--model_args", arguments, "--tasks", names, "--include_path", tasks]
    options += ["--batch_size", 8, "--output_path", folder, "--log_samples", *more]
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *map(str, options)],
        env={**os.environ, **offline, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tasks,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


def results(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("*_results.json")
    return json.loads(file.read_text())


def said(folder: Path, task: str) -> list[str]:
    """The answers in the samples that were logged, by the documents' numbers."""
    (file,) = folder.rglob(f"*_samples_{task}.jsonl")
    return [row["filtered_resps"] for row in sorted(sets.lines(file), key=lambda row: row["doc_id"])]


def test_answers_and_scores_are_our_own_and_a_second_run_finds_them_in_the_cache(tasks: Path, tmp_path: Path) -> None:
    arguments, names = f"method=v1.5,keep={KEEP},max_new_tokens={NEW}", "sparsevlm_digits,sparsevlm_pope"
    evaluate(tmp_path / "first", tasks, names, arguments, "--use_cache", tmp_path / "cache")
    data, model = held_out(QUESTIONS), sv.load(demo_model.path(), dtype=demo_model.DTYPE)
    every = list(zip(data.questions, data.scene_of.tolist(), strict=True))
    presence = [pair for pair in every if pair[0].answer in ("yes", "no")][:QUESTIONS]
    own, entering = {}, []
    for task, asked in (("sparsevlm_digits", every[:QUESTIONS]), ("sparsevlm_pope", presence)):
        shown = [[data.scenes[scene].pixels] for _, scene in asked]
        texts = [question.text for question, _ in asked]
        settings = {"sparsity": sv.Sparsity.v15(keep=KEEP), "max_new_tokens": NEW, "batch_size": 8}
        answers = [answer for _, answer in sorted(sv.answer_all(model, shown, texts, **settings))]
        own[task] = [answer.text for answer in answers]
        entering += [answer.entering_tokens for answer in answers]
        assert said(tmp_path / "first", task) == own[task] and len(set(own[task])) > 1

    found = results(tmp_path / "first")
    right = [text == question.answer for text, (question, _) in zip(own["sparsevlm_digits"], every, strict=False)]
    assert found["results"]["sparsevlm_digits"]["exact_match,none"] == pytest.approx(sum(right) / QUESTIONS)
    truth = [question.answer for question, _ in presence]
    pope = found["results"]["sparsevlm_pope"]
    accuracy = sum(a == b for a, b in zip(own["sparsevlm_pope"], truth, strict=True)) / QUESTIONS
    hits = sum(a == b == "yes" for a, b in zip(own["sparsevlm_pope"], truth, strict=True))
    f1 = 2 * hits / (own["sparsevlm_pope"].count("yes") + truth.count("yes"))
    assert pope["pope_accuracy,none"] == pytest.approx(accuracy) and pope["pope_f1_score,none"] == pytest.approx(f1)
    throughput = found["throughput"]
    assert throughput["avg_entering_tokens"] == pytest.approx(sum(entering) / len(entering))
    assert throughput["avg_visual_tokens"] == 196 and throughput["avg_prefill_seconds"] > 0
    assert throughput["avg_errors"] == 0 and throughput["total_gen_tokens"] >= 2 * QUESTIONS

    report = evaluate(tmp_path / "second", tasks, names, arguments, "--use_cache", tmp_path / "cache")
    assert f"{2 * QUESTIONS}/{2 * QUESTIONS} cache hits" in report
    assert all(said(tmp_path / "second", task) == own[task] for task in own)
    assert results(tmp_path / "second")["results"]["sparsevlm_pope"] == pope


def test_simple_requests_ask_the_same_as_messages(tasks: Path, tmp_path: Path) -> None:
    for folder, more in (("chat", ()), ("simple", ("--force_simple",))):
        evaluate(tmp_path / folder, tasks, "sparsevlm_digits", "method=dense", "--limit", 8, *more)
    answers = said(tmp_path / "chat", "sparsevlm_digits")
    assert said(tmp_path / "simple", "sparsevlm_digits") == answers and len(answers) == 8 and all(answers)


def test_videos_are_asked_about_and_one_that_is_missing_is_an_empty_answer(tmp_path: Path) -> None:
    path = hf.tiny_llava(tmp_path / "model", layers=2, family="video_llava", tower_layers=2)
    clips = [write_video(tmp_path / f"{number}.mkv", noise(6, seed=number)) for number in range(3)]
    clips.append(tmp_path / "missing.mkv")
    texts = ["what happens", "what is it", "who is it", "what"]
    rows = [{"video": str(clip), "question": text, "answer": "a"} for clip, text in zip(clips, texts, strict=True)]
    write_clips(tmp_path / "tasks" / "clips", rows)
    arguments = f"pretrained={path},method=v1.5,keep_at=0:5,frames=2"
    report = evaluate(tmp_path / "out", tmp_path / "tasks", "sparsevlm_clips", arguments)
    settings = {"sparsity": sv.sparsity("v1.5", keep_at=((0, 5),)), "max_new_tokens": 3, "frames": 2}
    wanted = sv.generate(sv.load(path), None, texts[:3], videos=[[clip] for clip in clips[:3]], **settings)
    assert said(tmp_path / "out", "sparsevlm_clips") == [*(text.split("\n")[0] for text in wanted), ""]
    assert "missing.mkv: no such file" in report and results(tmp_path / "out")["throughput"]["avg_errors"] == 1


def test_arguments_without_commas_become_settings_and_others_are_refused() -> None:
    from sparsevlm_jax.integrations.lmms_eval import ChatModel

    # As the command line hands them over: read by lmms-eval, with its own beside them.
    own = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}

    def made(arguments: str, **changed: Any) -> Any:
        return ChatModel.create_from_arg_string(arguments, {**own, **changed})

    assert made("keep_at=2:40+6:20")._settings["sparsity"] == sv.sparsity("v1.5", keep_at=((2, 40), (6, 20)))
    fastv = made("method=fastv,layers=3,keep=50,dtype=bfloat16,per_frame=false")
    assert fastv._settings["sparsity"] == sv.sparsity("fastv", layers=(3,), keep=50, per_frame=False)
    assert fastv.batch_size == 2 and fastv._model.params["language_model"]["lm_head"]["weight"].dtype == "bfloat16"
    for arguments, changed, message in (
        ("keep_at=2:40/6:20", {}, r"keep_at=2:40/6:20: expected LAYER:COUNT\+LAYER:COUNT"),
        ("layers=a", {}, "layers=a: expected LAYER"),
        ("kep=3", {}, "kep"),
        ("keep=3,flops_share=0.5", {}, "keep and flops_share are different budgets"),
        ("method=none", {}, 'method="none": expected one of'),
        ("keep=50", {"batch_size": "auto"}, "--batch_size auto: a whole number is expected"),
    ):
        with pytest.raises(UserError, match=message):
            made(arguments, **changed)


def test_what_a_task_asks_of_decoding_is_heard() -> None:
    from sparsevlm_jax.integrations import lmms_eval

    model = lmms_eval.ChatModel(max_new_tokens=20)
    assert model._how({"max_new_tokens": 128, "temperature": 0, "top_p": None}) == (20, 0.0, 1.0)
    assert model._how({"max_new_tokens": 5, "do_sample": True, "top_p": 0.9}) == (5, 1.0, 0.9)
    assert model._how({"temperature": 0.7, "do_sample": False}) == (20, 0.0, 1.0)
    with pytest.raises(UserError, match="num_beams 3"):
        model._how({"num_beams": 3})
    assert lmms_eval._until("a. b\nc", ["\n", "."]) == "a" and lmms_eval._until("a. b", None) == "a. b"
    with pytest.raises(UserError, match="whole videos"):
        lmms_eval._part({"url": "a.mp4", "video_start": 3.0})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevlm_jax.integrations.lmms_eval import ChatModel

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started as one of several processes"):
        ChatModel()
