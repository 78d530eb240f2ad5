"""ViP-LLaVA: several hidden states of the tower, behind a norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import contract


@pytest.fixture(scope="module")
def vipllava(tmp_path_factory: pytest.TempPathFactory) -> contract.Family:
    place = tmp_path_factory.mktemp("vipllava")
    return contract.family(
        place,
        large=(364, 14),
        small=(56, 14),
        family="vipllava",
        tower_layers=4,
        top={"vision_feature_layer": [-2, -3, 1]},
    )


@pytest.mark.parametrize("promise", contract.promises())
def test_vipllava_keeps_what_every_family_promises(promise: Any, vipllava: contract.Family, tmp_path: Path) -> None:
    promise(vipllava, tmp_path)
