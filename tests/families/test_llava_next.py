"""LLaVA-NeXT: tiles of a canvas, grouped queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax import Sparsity, UserError, generate
from tests.families import contract


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> contract.Family:
    canvases = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    place = tmp_path_factory.mktemp("llava_next")
    return contract.family(place, large=(112, 8), small=(56, 14), family="llava_next", kv_heads=2, canvases=canvases)


@pytest.mark.parametrize("promise", contract.promises(all_of_them=True))
def test_llava_next_keeps_what_every_family_promises(promise: Any, llava_next: contract.Family, tmp_path: Path) -> None:
    promise(llava_next, tmp_path)


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
def test_llava_next_answers_as_transformers_does_with_another_decoder(decoder: str, tmp_path: Path) -> None:
    top = {"image_grid_pinpoints": [[112, 224], [224, 112], [224, 224]]}
    sizes = {"image_size": 112, "patch_size": 8, "layers": 2, "kv_heads": 2}
    case = contract.case(tmp_path, family="llava_next", decoder=decoder, top=top, **sizes)
    contract.logits_and_tokens(contract.Family(case, case), tmp_path)


def test_tiles_without_their_packing_are_refused(llava_next: contract.Family) -> None:
    case = llava_next.small
    with pytest.raises(UserError, match="llava_next takes images with their packing"):
        case.answers(case.inputs._replace(packing=None), Sparsity.dense())


def test_a_budget_that_no_row_has_tokens_for_is_refused_whatever_the_bucket_holds(llava_next: contract.Family) -> None:
    case = llava_next.small
    most = max(layout.tokens for layout in case.inputs.layouts[:1])
    assert case.ours.config.visual_bucket(most) > most
    with pytest.raises(UserError, match=f"keep={most + 1}: the prompt has only {most} visual tokens"):
        generate(case.ours, case.images[0], "what", sparsity=Sparsity.v15(keep=most + 1), max_new_tokens=2)
