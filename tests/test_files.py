"""How JSON is read: what one file may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevlm_jax import UserError, bounds
from sparsevlm_jax.files import parse_json, read_json


def test_a_file_of_a_million_empty_objects_is_refused_before_any_is_made(tmp_path: Path) -> None:
    file = tmp_path / "special_tokens_map.json"
    file.write_text('{"a": [' + "{}," * 1_300_000 + "{}]}")
    with pytest.raises(UserError, match="1,300,003 lists and objects, expected at most 100,000"):
        read_json(file)


def test_a_tokenizer_of_many_merges_is_read() -> None:
    merges = '{"model": {"merges": [' + '["a", "b"], ' * 280_000 + '["a", "b"]]}}'  # as many as Llama 3 has
    found = parse_json(merges.encode(), "tokenizer.json", bounds.TOKENIZER_BYTES)
    assert len(found["model"]["merges"]) == 280_001
