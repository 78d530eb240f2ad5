"""Local tasks for lmms-eval: held-out questions of the embedded model in a form of its own, and in that of POPE.

python -m tests.integrations.tasks FOLDER [NUMBER]
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN = """\
task: sparsevlm_{name}
dataset_path: {kind}
dataset_kwargs: {{data_files: {{test: {name}.{kind}}}}}
test_split: test
output_type: generate_until
doc_to_visual: {shown}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {most}, temperature: 0, until: ["\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
POPE = """\
include: %s
task: sparsevlm_pope
dataset_path: parquet
dataset_kwargs: {data_files: {test: pope.parquet}}
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: ""}}
"""


def write_tasks(folder: Path, number: int) -> None:
    """The tasks sparsevlm_digits and sparsevlm_pope, of so many questions each."""
    import lmms_eval

    from training.heldout import held_out

    data = held_out(number)
    rows = [
        {"image": data.scenes[scene].pixels, "question": question.text, "answer": question.answer}
        for question, scene in zip(data.questions, data.scene_of.tolist(), strict=True)
    ]
    presence = [{**row, "question_id": i} for i, row in enumerate(rows) if row["answer"] in ("yes", "no")]
    pope = Path(*lmms_eval.__path__) / "tasks" / "pope" / "pope.yaml"
    digits = PLAIN.format(name="digits", kind="parquet", shown="image", most=16)
    _write(folder / "digits", digits, "digits.parquet", rows[:number])
    _write(folder / "pope", POPE % pope, "pope.parquet", presence[:number])


def write_clips(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The task sparsevlm_clips, of questions about video files."""
    folder.mkdir(parents=True)
    (folder / "clips.yaml").write_text(PLAIN.format(name="clips", kind="json", shown="video", most=3))
    (folder / "clips.json").write_text(json.dumps(rows))


def _write(folder: Path, task: str, data: str, rows: Sequence[dict[str, Any]]) -> None:
    from datasets import Dataset, Image

    folder.mkdir(parents=True)
    (folder / f"{data.split('.')[0]}.yaml").write_text(task)
    # With the types of its columns in the file: else an image would come back as a dict.
    from PIL import Image as Pillow

    made = Dataset.from_list([{**row, "image": Pillow.fromarray(row["image"])} for row in rows])
    made.cast_column("image", Image()).to_parquet(str(folder / data))


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 96)
