"""`sparsevlm answer`: files of questions in, a file of answers out, whatever happens in between."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparsevlm_jax as sv
from sparsevlm_jax import Model, UserError
from sparsevlm_jax.cli import main
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.evaluate import answers_file
from sparsevlm_jax.evaluate.record import checksum, record_file
from sparsevlm_jax.evaluate.run import Job
from sparsevlm_jax.generation import batches
from sparsevlm_jax.generation.batches import Batcher
from sparsevlm_jax.inputs.video import Sampling
from tests import hf
from tests.evaluate import sets
from tests.evaluate.sets import NEW, SPARSITY, answer, lines, write_lines
from tests.videos import noise, write_video

MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.tiny_llava(tmp_path_factory.mktemp("answer") / "model", layers=2)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return sets.speaking(checkpoint)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(model: Model, images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The answers of one run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(write_lines(folder / "q.jsonl", sets.questions()), images, folder / "a.jsonl")
    summary = answer(model, job)
    assert (summary["answered"], summary["errors"]) == (9, 0)
    return job.answers.read_bytes()


@pytest.fixture
def make_job(tmp_path: Path, images: Path) -> MakeJob:
    """A job on the questions of `sets`, or on others."""

    def make(rows: list[dict[str, Any]] | None = None, **changed: Any) -> Job:
        questions = write_lines(tmp_path / "q.jsonl", sets.questions() if rows is None else rows)
        return replace(Job(questions, images, tmp_path / "a.jsonl"), **changed)

    return make


def test_answers_stand_in_the_order_of_the_questions_and_are_those_of_generate(
    undisturbed: bytes, model: Model, images: Path
) -> None:
    asked, found = sets.questions(), [json.loads(line) for line in undisturbed.splitlines()]
    assert [(row["question_id"], row["prompt"]) for row in found] == [(q["question_id"], q["text"]) for q in asked]
    pairs = [(number, asked[number]) for number in (0, 1, 2, 5)]
    shown = [[images / question["image"]] for _, question in pairs]
    texts = [question["text"] for _, question in pairs]
    said = sv.generate(model, shown, texts, sparsity=SPARSITY, max_new_tokens=NEW)
    assert [found[number]["text"] for number, _ in pairs] == said and len(set(said)) > 2
    dense = sv.generate(model, None, "what", sparsity="dense", max_new_tokens=NEW)
    assert found[3]["text"] == dense and found[3]["metadata"]["visual_tokens"] == [0]


def test_an_answer_has_the_keys_of_llavas_files_and_what_it_took(undisturbed: bytes, model: Model) -> None:
    found = [json.loads(line) for line in undisturbed.splitlines()]
    assert list(found[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert found[0]["model_id"] == model.name
    assert found[0]["metadata"]["visual_tokens"][0] == 16 and found[0]["metadata"]["visual_tokens"][1] < 16
    assert found[0]["metadata"]["flops"] < found[0]["metadata"]["dense_flops"]
    assert len({row["answer_id"] for row in found}) == len(found)


def test_a_run_that_is_killed_in_the_middle_of_a_line_goes_on_to_the_same_file(
    checkpoint: Path, model: Model, make_job: MakeJob, undisturbed: bytes
) -> None:
    job = make_job()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.evaluate.sets"])
    process = context.Process(target=sets.victim, args=(checkpoint, job, 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    torn = job.answers.read_bytes()
    assert torn and not torn.endswith(b"\n")
    whole = torn.count(b"\n")
    summary = answer(model, job)
    assert summary["answered"] == len(sets.questions()) - whole
    assert job.answers.read_bytes() == undisturbed


@pytest.mark.parametrize("left", [1, 300, -1])
def test_what_is_left_of_a_file_is_kept_and_the_rest_answered_once(
    left: int, model: Model, make_job: MakeJob, undisturbed: bytes
) -> None:
    job = make_job()
    answer(model, job)
    job.answers.write_bytes(undisturbed[:left])
    assert answer(model, job)["answered"] == 9 - undisturbed[:left].count(b"\n")
    assert job.answers.read_bytes() == undisturbed
    assert answer(model, job)["answered"] == 0
    assert job.answers.read_bytes() == undisturbed


def test_the_shards_together_are_the_whole(model: Model, make_job: MakeJob, undisturbed: bytes, tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        job = make_job(shard=(number, 3), answers=tmp_path / f"{number}.jsonl")
        answer(model, job)
        parts.append(job.answers.read_bytes().splitlines(keepends=True))
    assert [line for three in zip(*parts, strict=True) for line in three] == undisturbed.splitlines(keepends=True)


def test_a_limit_can_be_raised_later(model: Model, make_job: MakeJob, undisturbed: bytes) -> None:
    assert answer(model, make_job(limit=4))["answered"] == 4
    assert make_job().answers.read_bytes() == b"".join(undisturbed.splitlines(keepends=True)[:4])
    assert answer(model, make_job(limit=4, shard=(0, 1)))["answered"] == 0
    assert answer(model, make_job())["answered"] == 5
    assert make_job().answers.read_bytes() == undisturbed


def test_an_image_that_cannot_be_read_is_an_answer_with_an_error_and_disturbs_no_other(
    model: Model, make_job: MakeJob, undisturbed: bytes, tmp_path: Path, images: Path
) -> None:
    folder = sets.write_images(tmp_path / "images")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "link.png").symlink_to(images / "a.png")
    bad = ["broken.png", "missing.png", "../images/a.png", str(folder / "a.png"), "link.png", ".."]
    rows = [{"question_id": f"bad{i}", "image": name, "text": "what"} for i, name in enumerate(bad)]
    rows.append({"question_id": "markers", "image": "a.png", "text": "<image> and <image>"})
    rows.append({"question_id": "long", "image": "a.png", "text": "a b " * 1000})
    job = make_job([*rows[:4], *sets.questions(), *rows[4:]], images=folder)
    summary = answer(model, job)
    assert (summary["answers"], summary["errors"]) == (17, 8)
    found = lines(job.answers)
    assert found[4:13] == [json.loads(line) for line in undisturbed.splitlines()]
    errors = [row["metadata"]["error"] for row in [*found[:4], *found[13:]]]
    expected = ["cut short", "no such file", *["not the name of a file inside"] * 2, "leads out", "not the name of"]
    for error, part in zip(errors, [*expected, "2 <image> markers", "more than the model's"], strict=True):
        assert part in error
    assert answer(model, job)["answered"] == 0


def test_a_strict_run_stops_at_the_first_error_and_keeps_what_it_has(model: Model, make_job: MakeJob) -> None:
    rows = [*sets.questions(), {"question_id": "bad", "image": "nope.png", "text": f"{sets.LONG} now"}]
    with pytest.raises(UserError, match='question_id "bad": .*nope.png: no such file'):
        answer(model, make_job(rows, strict=True))
    kept = lines(make_job(rows).answers)
    assert kept and all("error" not in row["metadata"] for row in kept)
    assert answer(model, make_job(rows))["errors"] == 1


def test_other_settings_are_refused_by_name(model: Model, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    answer(model, job)
    before = job.answers.read_bytes()
    for changed, message in (
        ({"sparsity": "dense"}, 'plan.method was "v1.5", now "dense"'),
        ({"max_new_tokens": 4}, "max_new_tokens was 3, now 4"),
        ({"top_p": 0.5}, "top_p was 1.0, now 0.5"),
        ({"seed": 1}, "key was .*, now"),
    ):
        with pytest.raises(UserError, match=message):
            answer(model, job, **changed)
    with pytest.raises(UserError, match="suffix was None, now"):
        answer(model, replace(job, suffix="Answer in a word."))
    with pytest.raises(UserError, match="questions was"):
        answer(model, make_job(sets.questions()[:-1]))
    params = {**model.params, "multi_modal_projector": {**model.params["multi_modal_projector"]}}
    weight = params["multi_modal_projector"]["linear_1"]["weight"]
    params["multi_modal_projector"]["linear_1"] = {
        **params["multi_modal_projector"]["linear_1"],
        "weight": weight.at[0, 0].add(1e-3),
    }
    with pytest.raises(UserError, match="model.weights was"):
        answer(replace(model, params=params), make_job())
    record_file(job.answers).unlink()
    with pytest.raises(UserError, match="no a.jsonl.run.json says what made it"):
        answer(model, make_job())
    assert job.answers.read_bytes() == before


def test_answers_to_other_questions_are_refused(model: Model, make_job: MakeJob) -> None:
    job = make_job()
    answer(model, job)
    stranger = {**lines(job.answers)[0], "question_id": "stranger"}
    write_lines(job.answers, [*lines(job.answers), stranger])
    with pytest.raises(UserError, match='1 answers that are not to these questions, such as question_id "stranger"'):
        answer(model, job)
    job.answers.write_text('{"question_id": 1}\n')
    with pytest.raises(UserError, match="line 1: `prompt` is None"):
        answer(model, job)


def test_the_record_says_what_made_the_answers(model: Model, make_job: MakeJob) -> None:
    answer(model, make_job(limit=3))
    answer(model, make_job())
    record = json.loads(record_file(make_job().answers).read_text())
    assert [sitting["answered"] for sitting in record["sittings"]] == [3, 6]
    assert record["settings"]["model"]["weights"] == checksum(model.params)
    assert record["settings"]["plan"]["budget"]["keep_at"] == [[0, 5]]
    assert {"python", "jax", "transformers"} <= record["settings"]["versions"].keys()
    assert record["summary"]["answers"] == 9 and record["summary"]["flops"] > 0


def test_two_processes_do_not_write_the_same_answers(model: Model, make_job: MakeJob) -> None:
    job = make_job()
    with open(job.answers, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing answers there"):
            answer(model, job)


def test_a_file_that_is_replaced_between_opening_and_locking_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sorted_file = tmp_path / "a.jsonl", tmp_path / "sorted"
    file.touch()
    sorted_file.touch()
    monkeypatch.setattr(fcntl, "flock", lambda *_: sorted_file.replace(file))
    with pytest.raises(UserError, match="another process has just written it"), answers_file.writing(file):
        pass


@pytest.mark.parametrize("abreast", [False, True])
def test_every_batch_is_on_the_disk_before_the_next_or_on_a_cpu_the_third_after_it(
    model: Model, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, abreast: bool
) -> None:
    job, written, synced = make_job(), [], []
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: abreast)
    run, fsync = Batcher.run, os.fsync

    def watched_run(self: Batcher, prepared: Any) -> Any:
        written.append(job.answers.read_bytes().count(b"\n"))
        return run(self, prepared)

    def watched_fsync(stream: int) -> None:
        fsync(stream)
        if os.path.samestat(os.fstat(stream), job.answers.stat()):
            synced.append(job.answers.read_bytes().count(b"\n"))

    monkeypatch.setattr(Batcher, "run", watched_run)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    answer(model, job)
    assert synced == [2, 4, 6, 8, 9]
    if abreast:
        assert all(found >= sure for found, sure in zip(sorted(written), [0, 0, 0, 2, 4], strict=True))
    else:
        assert written == [0, *synced[:-1]]


def test_a_file_that_cannot_be_written_any_more_is_one_line(
    model: Model, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    job = make_job()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        answer(model, job)


def test_videos_are_answered_too(tmp_path: Path) -> None:
    path = hf.tiny_llava(tmp_path / "model", layers=2, family="video_llava", tower_layers=2)
    model, folder = sets.speaking(path), tmp_path
    write_video(folder / "clip.mkv", noise(6))
    rows = [
        {"question_id": 1, "video": "clip.mkv", "text": "what happens"},
        {"question_id": 2, "video": "clip.mkv", "text": "what is it"},
        {"question_id": 3, "video": "nope.mkv", "text": "what is it"},
    ]
    job = Job(write_lines(tmp_path / "q.jsonl", rows), folder, tmp_path / "a.jsonl")
    summary = answer(model, job, sampling=Sampling(2))
    assert summary["errors"] == 1
    found = lines(job.answers)
    assert "nope.mkv: no such file" in found[2]["metadata"]["error"]
    clips, texts = [[folder / "clip.mkv"]] * 2, ["what happens", "what is it"]
    said = sv.generate(model, None, texts, videos=clips, frames=2, sparsity=SPARSITY, max_new_tokens=NEW)
    assert [row["text"] for row in found[:2]] == said
    assert found[0]["metadata"]["visual_tokens"][0] == 2 * 17


def test_the_command_prints_a_summary_and_counts_errors_in_its_exit_code(
    checkpoint: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job([*sets.questions()[:3], {"question_id": "bad", "image": "nope.png", "text": "what"}])
    options = ["answer", "--questions", job.questions, "--images", job.images, "--answers", job.answers]
    options += ["--batch-size", 2, "--max-new-tokens", NEW, "--keep-at", "0:5"]

    def call(*more: object, model: Path | None = checkpoint) -> tuple[Any, str, str]:
        which = [] if model is None else ["--model", model]
        with pytest.raises(SystemExit) as stop:
            main.main([*map(str, [*options, *which, *more])])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    code, out, err = call("--json")
    assert code == 1 and json.loads(out)["errors"] == 1 and "embedded" not in err
    assert "4 answers, 4 of them now; v1.5: of 16.0 visual tokens" in err and "1 question without an answer" in err
    monkeypatch.setattr(demo_model, "path", lambda: checkpoint)
    _, out, err = call("--json", model=None)
    assert "no --model is given: the embedded demo model answers" in err and json.loads(out)["answered"] == 0
    code, _, err = call("--shard", "3/3")
    assert code == 2 and "shard 3/3" in err
    code, _, err = call("--images", job.images / "none")
    assert code == 2 and "no such folder" in err
    code, _, err = call("--method", "dense", "--keep-at", "0:4")
    assert code == 2


def test_the_next_batch_is_prepared_while_the_device_works(
    model: Model, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, overlapped = threading.Semaphore(0), []
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: False)
    run, prepare = Batcher.run, Batcher.prepare

    def watched_prepare(self: Batcher, batch: Any) -> Any:
        began.release()
        return prepare(self, batch)

    def watched_run(self: Batcher, prepared: Any) -> Any:
        began.acquire()  # its own
        overlapped.append(len(overlapped) == 2 or began.acquire(timeout=20))  # nothing follows the third batch
        began.release()
        return run(self, prepared)

    monkeypatch.setattr(Batcher, "prepare", watched_prepare)
    monkeypatch.setattr(Batcher, "run", watched_run)
    assert answer(model, make_job(limit=4))["errors"] == 0
    assert overlapped == [True] * 3
