"""The file of answers: a line for each, on the disk before the next batch, whole whatever happens to the process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsevlm_jax.bounds import LINE_BYTES
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.questions import Key, Question, read_id, read_text
from sparsevlm_jax.files import parse_json, read_lines, require_writable, write
from sparsevlm_jax.generation.answer import Answer


def answer_row(question: Question, answer: Answer, model_id: str) -> dict[str, Any]:
    """An answer as LLaVA's scripts write and read it; nothing in it differs from run to run."""
    if answer.error is not None:
        metadata: dict[str, Any] = {"error": answer.error}
    else:
        metadata = {
            "visual_in_prompt": answer.visual_tokens[0],
            "visual_tokens": list(answer.visual_tokens),
            "entering_tokens": round(answer.entering_tokens, 3),
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.tokens),
            "flops": answer.flops,
            "dense_flops": answer.dense_flops,
        }
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        "answer_id": hashlib.sha256(json.dumps([model_id, *question.key]).encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": metadata,
    }


class AnswersFile:
    """Answers that are there, and those that come. `writing` opens it."""

    def __init__(self, file: Path, stream: Any) -> None:
        self.file, self._stream = file, stream
        self.rows: dict[Key, dict[str, Any]] = {}
        seen: Counter[Any] = Counter()
        end = 0
        for number, line in read_lines(file):
            if not line.endswith(b"\n"):  # the writer was killed in the middle of it
                break
            end += len(line)
            name = f"{file}: line {number}"
            row = parse_json(line, name, LINE_BYTES)
            pair = read_id(row, "question_id", name), read_text(row, "prompt", name)
            if not isinstance(row.get("metadata"), dict):
                raise UserError(f"{name}: no `metadata`, which answers have that were written here")
            self.rows[(*pair, seen[pair])] = row
            seen[pair] += 1
        self._stream.truncate(end)
        self._stream.seek(end)

    def require_of(self, questions: Sequence[Question]) -> None:
        """Refuses a file that answers other questions.

        Raises:
          UserError: it does.
        """
        strangers = self.rows.keys() - {question.key for question in questions}
        if strangers:
            found = min(strangers, key=str)
            raise UserError(
                f"{self.file}: holds {len(strangers)} answers that are not to these questions, such as question_id "
                f"{shown(found[0])}: give another name for the answers"
            )

    def append(self, answered: Mapping[Key, dict[str, Any]]) -> None:
        """Writes a batch; when this returns it is on the disk.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self._stream.write("".join(f"{json.dumps(row)}\n" for row in answered.values()).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written: {error.strerror or error}") from error
        self.rows.update(answered)

    def sort(self, questions: Sequence[Question]) -> None:
        """Puts the answers into the order of their questions, if they are not; a crash leaves one or the other."""
        ordered = [question.key for question in questions if question.key in self.rows]
        if ordered != list(self.rows):
            lines = (f"{json.dumps(self.rows[key])}\n" for key in ordered)
            write(self.file, "".join(lines).encode())


@contextmanager
def writing(file: Path) -> Iterator[AnswersFile]:
    """The file of answers, opened for one process alone; a torn last line is cut off.

    Raises:
      UserError: it cannot be written, another process writes it, or it is no file of answers.
    """
    require_writable(file)
    try:
        stream = open(file, "r+b" if file.exists() else "w+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    with stream:
        _lock(stream, file)
        yield AnswersFile(file, stream)


def _lock(stream: Any, file: Path) -> None:
    """The lock goes with the process, however it ends; some network drives have none."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file}: another process is writing answers there") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"{file}: cannot be locked: {error.strerror}") from error
