"""LLaVA with a SigLIP tower and a Qwen2 decoder: no class token, biases, grouped queries, a tied head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import contract


@pytest.fixture(scope="module")
def llava_qwen2(tmp_path_factory: pytest.TempPathFactory) -> contract.Family:
    place = tmp_path_factory.mktemp("llava_qwen2")
    return contract.family(
        place,
        large=(364, 14),
        small=(60, 14),
        tower="siglip_vision_model",
        decoder="qwen2",
        kv_heads=2,
        tie_word_embeddings=True,
        top={"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "tie_word_embeddings": True},
    )


@pytest.mark.parametrize("promise", contract.promises())
def test_llava_qwen2_keeps_what_every_family_promises(
    promise: Any, llava_qwen2: contract.Family, tmp_path: Path
) -> None:
    promise(llava_qwen2, tmp_path)
