"""LLaVA-1.5: one square of patches, as many heads of keys as of queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import contract


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> contract.Family:
    place = tmp_path_factory.mktemp("llava")
    return contract.family(place, large=(364, 14), small=(56, 14))


@pytest.mark.parametrize("promise", contract.promises())
def test_llava_keeps_what_every_family_promises(promise: Any, llava: contract.Family, tmp_path: Path) -> None:
    promise(llava, tmp_path)
