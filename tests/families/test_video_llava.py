"""Video-LLaVA against transformers: images, videos and both in one prompt, dense and pruned."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import VideoLlavaImageProcessor

import sparsevlm_jax as sv
from sparsevlm_jax import UserError
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.verify import verify
from sparsevlm_jax.generation.api import require_processor
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.inputs.processor import Inputs, Processor
from sparsevlm_jax.inputs.video import Sampling
from sparsevlm_jax.models.family import config_from_hf
from tests import models
from tests.families import contract
from tests.families.contract import ATOL, NEW, QUESTIONS, Case
from tests.hf import CHAT_TEMPLATE, tiny_llava
from tests.videos import noise, write_video

SIDE, PATCHES, FRAMES = 56, 16, 8
VIDEO = FRAMES * (PATCHES + 1)
# Of each row: its images and its videos, by seed.
ROWS = {
    "a video": ((), (1,)),
    "images": ((2, 3), ()),
    "an image and a video": ((4,), (5,)),
    "two videos and an image": ((6,), (7, 8)),
}


# Parts of a chat template.
TEXTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text')"
VIDEOS = "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def video_llava(tmp_path_factory: pytest.TempPathFactory) -> contract.Family:
    place = tmp_path_factory.mktemp("video_llava")
    return contract.family(place, large=(364, 14), small=(SIDE, SIDE // 4), family="video_llava")


@pytest.fixture(scope="module")
def case(video_llava: contract.Family) -> Case:
    return video_llava.small


@pytest.mark.parametrize("promise", contract.promises())
def test_video_llava_keeps_with_images_what_every_family_promises(
    promise: Any, video_llava: contract.Family, tmp_path: Path
) -> None:
    promise(video_llava, tmp_path)


def film(seed: int) -> np.ndarray:
    """uint8 [8, 120, 130, 3]: noise on slopes that move."""
    slope = np.linspace(0, 120, 130)[None, None, :, None] * np.linspace(0.2, 1, FRAMES)[:, None, None, None]
    return (slope + noise(FRAMES, 120, 130, seed=seed) // 2).astype(np.uint8)


def inputs_of(case: Case, *names: str, question: str = QUESTIONS[0]) -> Inputs:
    rows = [ROWS[name] for name in names]
    images = [[contract.image((100, 130), seed) for seed in own] for own, _ in rows]
    videos = [[film(seed) for seed in own] for _, own in rows]
    return require_processor(case.ours)(images, [question] * len(rows), videos=videos)


def torch_inputs(case: Case, name: str) -> dict[str, Any]:
    """What transformers takes: the markers by their own ids, images and frames in two arrays."""
    inputs, config = inputs_of(case, name), case.ours.config
    ids, marker = inputs.ids[0].astype(np.int64), inputs.ids[0] == config.image_token_id
    assert config.video_token_id is not None
    kinds = np.repeat([layout.is_video for layout in inputs.layouts], [layout.tokens for layout in inputs.layouts])
    ids[marker] = np.where(kinds, config.video_token_id, config.image_token_id)
    found = {"input_ids": torch.from_numpy(ids)[None], "attention_mask": torch.ones((1, len(ids)), dtype=torch.long)}
    if len(inputs.pixel_values):
        found["pixel_values_images"] = torch.from_numpy(inputs.pixel_values)
    if inputs.frames is not None:
        found["pixel_values_videos"] = torch.from_numpy(inputs.frames.reshape(-1, FRAMES, 3, SIDE, SIDE))
    return found


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_transformers(case: Case, name: str) -> None:
    config, inputs = case.ours.config, inputs_of(case, name)
    dense = contract.settings(sv.Sparsity.dense())
    run = GenerationRequest(case.ours.params, config, inputs.ids, inputs.images, **dense)
    prompt = sv.embed(
        run.params, jnp.asarray(run.packed.input_ids), jnp.asarray(run.packed.lengths), run.images, config
    )
    logits, _, _ = jax.jit(partial(sv.prefill, config=config, plan=run.plan, max_new_tokens=0))(run.params, prompt)
    with torch.no_grad():
        expected = case.theirs(**torch_inputs(case, name)).logits[0, -1].numpy()
    np.testing.assert_allclose(logits[0], expected, atol=ATOL, rtol=0)
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_those_of_transformers(case: Case, name: str) -> None:
    inputs = torch_inputs(case, name)
    with torch.no_grad():
        expected = case.theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert case.answers(inputs_of(case, name), sv.Sparsity.dense()) == [
        expected[0, inputs["input_ids"].shape[1] :].tolist()
    ]


def test_features_are_those_of_transformers_tower_by_tower(case: Case) -> None:
    inputs = inputs_of(case, "an image and a video")
    found = sv.encode_images(case.ours.params, jax.device_put(inputs.images), case.ours.config).tokens
    theirs = torch_inputs(case, "an image and a video")
    with torch.no_grad():
        image = case.theirs.model.get_image_features(theirs["pixel_values_images"]).pooler_output
        video = case.theirs.model.get_video_features(theirs["pixel_values_videos"]).pooler_output
    assert image.shape[1] == PATCHES and video.shape[1] == PATCHES + 1
    width = found.shape[1]
    np.testing.assert_allclose(
        found, torch.cat([image.reshape(-1, width), video.reshape(-1, width)]), atol=ATOL, rtol=0
    )


@pytest.mark.parametrize("name, sparsity", [("v1.5", sv.Sparsity.v15(keep=60)), ("video", sv.Sparsity.video())])
def test_rows_of_a_batch_are_answered_as_alone(case: Case, name: str, sparsity: sv.Sparsity) -> None:
    rows = ("a video", "two videos and an image")
    together = case.answers(inputs_of(case, *rows), sparsity)
    assert together == [case.answers(inputs_of(case, row), sparsity)[0] for row in rows]


def test_up_to_its_pruning_layer_a_pruned_prefill_is_the_dense_one(case: Case) -> None:
    config, inputs = case.ours.config, inputs_of(case, "an image and a video")
    row = jnp.asarray(inputs.ids[0])[None]
    prompt = sv.embed(case.ours.params, row, jnp.asarray([row.shape[1]]), jax.device_put(inputs.images), config)
    visual = inputs.ids[0] == config.image_token_id
    np.testing.assert_array_equal(prompt.visual[0], visual)
    traces = {}
    for name, sparsity in (("dense", sv.Sparsity.dense()), ("pruned", sv.Sparsity.video())):
        plan = sv.make_plan(sparsity, config, int(visual.sum()))
        run = jax.jit(partial(sv.prefill, config=config, plan=plan, trace=True, max_new_tokens=0))
        traces[name] = run(case.ours.params, prompt)[2]
    dense, pruned = (np.asarray(traces[name].last_hidden[:, 0]) for name in ("dense", "pruned"))
    np.testing.assert_allclose(pruned[:2], dense[:2], atol=1e-5, rtol=0)
    assert np.abs(pruned[2:] - dense[2:]).max() > 1e-3
    (event,) = traces["pruned"].events
    kept = np.asarray(event.selection.kept[0])
    assert 0 < kept.sum() < visual.sum() and not kept[~visual].any()


def test_a_converted_checkpoint_is_verified_against_its_source(case: Case, tmp_path: Path) -> None:
    convert(case.folder, tmp_path / "converted")
    assert verify(case.folder, tmp_path / "converted").passed


def test_files_arrays_and_messages_give_one_answer(case: Case, tmp_path: Path) -> None:
    frames, settings = film(1), {"sparsity": "dense", "max_new_tokens": 4}
    file, part = write_video(tmp_path / "clip.mkv", frames), {"type": "text", "text": "where"}
    expected = sv.generate(case.ours, None, "where", videos=frames, **settings)
    messages = [{"role": "user", "content": [{"type": "video", "video": str(file)}, part]}]
    assert sv.generate(case.ours, None, "where", videos=str(file), **settings) == expected
    assert sv.generate(case.ours, None, messages, **settings) == expected
    assert "".join(sv.stream(case.ours, None, "where", videos=[file], every=4, **settings)) == expected
    assert sv.generate(case.ours, None, ["where", "where"], videos=[[frames], [frames]], **settings) == [expected] * 2
    with pytest.raises(UserError, match="videos in the messages and beside them"):
        sv.generate(case.ours, None, messages, videos=file, **settings)


def test_images_and_videos_stand_where_their_markers_do(case: Case) -> None:
    """In whatever order: each visual token comes from its own tower."""
    image, video = contract.image((112, 112), 0), film(0)
    features = {}
    for question in ("<image> and <video> ", "<video> and <image> "):
        inputs = require_processor(case.ours)([[image]], [question], videos=[[video]])
        features[question] = sv.encode_images(case.ours.params, jax.device_put(inputs.images), case.ours.config).tokens
    first, second = features.values()
    np.testing.assert_allclose(np.roll(first, VIDEO, axis=0), second, atol=1e-6)
    assert np.abs(np.asarray(first - second)).max() > 0.1


def test_questions_about_one_video_share_it_if_their_markers_agree(case: Case) -> None:
    processor, shown = require_processor(case.ours), ([[contract.image((112, 112), 0)]], [[film(0)]])
    same = processor(shown[0], ["who", "what is it"], videos=shown[1])
    assert same.frames is not None and len(same.pixel_values) == 1 and len(same.frames) == FRAMES
    other = processor(shown[0], ["<image> or <video>", "<video> or <image>"], videos=shown[1])
    assert other.frames is not None and len(other.pixel_values) == 2 and len(other.frames) == 2 * FRAMES


def test_prompts_have_the_form_of_the_model_card(case: Case) -> None:
    processor = require_processor(case.ours)
    assert processor.prompt("what?", 0, 1) == "USER: <video>\nwhat? ASSISTANT:"
    assert processor.prompt("what?", 1, 1) == "USER: <image>\n<video>\nwhat? ASSISTANT:"
    both = CHAT_TEMPLATE.replace(TEXTS, VIDEOS + TEXTS)
    own = Processor(processor.tokenizer, processor.image_processor, both, processor.config)
    assert own.prompt("what?", 1, 2) == "USER: <image>\n<video>\n<video>\nwhat? ASSISTANT:"
    images_only = Processor(processor.tokenizer, processor.image_processor, CHAT_TEMPLATE, processor.config)
    with pytest.raises(UserError, match="0 <video> tokens for 1 video: the chat template"):
        images_only([[]], ["what?"], videos=[[film(0)]])


@pytest.mark.parametrize(
    "question, videos, message",
    [
        ("<video> or <video>", 1, "2 <video> markers, but 1 video came"),
        ("<video>", 2, "1 <video> marker, but 2 videos came"),
        ("<video>", 0, "1 <video> marker, but 0 videos came"),
        ("<image>", 1, "1 <image> marker, but 0 images came"),
    ],
)
def test_wrong_numbers_of_markers_are_errors(case: Case, question: str, videos: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_processor(case.ours)([[]], [question], videos=[[film(0)] * videos])


def test_a_model_without_videos_refuses_them_by_name(tmp_path: Path) -> None:
    model = sv.load(tiny_llava(tmp_path / "llava", layers=2))
    with pytest.raises(UserError, match="llava: takes images only, no videos"):
        sv.generate(model, None, "what is it", videos=film(0))


def test_pixels_are_those_of_the_family_s_own_image_processor(case: Case, tmp_path: Path) -> None:
    """Which a published checkpoint names."""
    settings = json.loads((case.folder / "preprocessor_config.json").read_text())
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    theirs = VideoLlavaImageProcessor(**{name: settings[name] for name in names})
    frames, image = film(3), contract.image((100, 130), 4)
    expected = theirs([*frames, np.asarray(image)], return_tensors="np")["pixel_values_images"]
    folder = shutil.copytree(case.folder, tmp_path / "named")
    settings["image_processor_type"] = "VideoLlavaImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Processor.from_pretrained(folder, case.ours.config)
    assert processor is not None
    found = processor([[image]], ["what"], videos=[[frames]])
    assert found.frames is not None
    np.testing.assert_allclose(found.frames, expected[:FRAMES], atol=1e-6)
    np.testing.assert_allclose(found.pixel_values, expected[FRAMES:], atol=1e-6)


def names_of_4x(name: str) -> str:
    """As transformers 4.x wrote a tensor that 5.x writes by this name."""
    for tower in ("video_tower.", "image_tower."):
        name = name.replace(tower, f"{tower}vision_model.") if "vision_model." not in name else name
    return name


@pytest.mark.parametrize("rename", [names_of_4x, lambda name: name.replace("vision_model.", "")], ids=["4.x", "5.x"])
def test_tensors_are_read_by_the_names_of_either_release(case: Case, tmp_path: Path, rename: Any) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "renamed")
    tensors = {rename(name): array for name, array in load_file(folder / "model.safetensors").items()}
    tensors["video_tower.vision_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, sv.load(folder).params, case.ours.params)


def test_temporal_attention_is_refused_by_its_tensors_names(case: Case, tmp_path: Path) -> None:
    folder, name = shutil.copytree(case.folder, tmp_path / "time"), "encoder.layers.0.temporal_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors") | {f"video_tower.{name}": np.zeros((32, 32), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="temporal_attn"):
        sv.load(folder)


@pytest.mark.parametrize("more", [{}, {"mm_vision_tower": "clip"}, {"model_type": "llava_llama"}])
def test_the_original_layout_is_refused_for_its_temporal_attention(tmp_path: Path, more: dict[str, str]) -> None:
    config = {
        "model_type": "llava",
        "mm_image_tower": "LanguageBind/LanguageBind_Image",
        "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
        "mm_projector_type": "mlp2x_gelu",
        **more,
    }
    with pytest.raises(
        UserError, match="original Video-LLaVA layout .mm_video_tower and mm_image_tower.*temporal_attn"
    ):
        config_from_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {"model.video_tower.video_tower.embeddings.class_embedding": np.zeros(4, np.float32)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="whose video tower attends over frames"):
        convert(tmp_path, tmp_path.with_name("converted"))


def test_defaults_of_the_decoder_are_not_those_of_llava(case: Case) -> None:
    """What a file leaves out is Llama's own, and the tower's is CLIP's at 224 pixels."""
    config = config_from_hf({"model_type": "video_llava"})
    assert (config.text.rms_norm_eps, config.text.max_position_embeddings) == (1e-6, 2048)
    assert (config.image_token_id, config.video_token_id, config.vision.image_size) == (32000, 32001, 224)
    preset = sv.PRESETS["video-llava-7b"]()
    assert (preset.text.rms_norm_eps, preset.text.max_position_embeddings, preset.text.vocab_size) == (
        1e-5,
        4096,
        32064,
    )
    assert preset.video_layout(8).tokens == 2056 and preset.tokens_per_image == 256
    with pytest.raises(UserError, match="image_token_index and video_token_index are both 32001"):
        config_from_hf({"model_type": "video_llava", "image_token_index": 32001})


@pytest.mark.parametrize(
    "rank, stand, standing, entering",
    [
        (6, 68, 130.1, 192.2),
        (8, 70, 132.1, 194.1),
        (9, 71, 133.0, 195.1),
        (11, 73, 135.0, 196.9),
        (16, 78, 139.8, 201.6),
    ],
)
def test_the_released_setting_stands_and_enters_as_the_papers_count(rank, stand, standing, entering) -> None:
    plan = sv.make_plan(sv.Sparsity.video(), sv.PRESETS["video-llava-7b"](), 2056, rank)
    assert [stage.standing for stage in plan.stages] == [stand, stand]
    assert plan.stages[0].keep == rank and (plan.stages[0].start, plan.stages[0].stop) == (0, 2)
    assert abs(plan.equivalent_tokens() - standing) < 0.06
    assert abs(plan.entering_tokens() - entering) < 0.06
    assert sv.Sparsity.video() == sv.sparsity("v1", scale=1.0, bias=0.0, layers=(1,))


def test_videos_of_different_length_are_one_batch(case: Case, tmp_path: Path) -> None:
    settings: Any = {"sparsity": sv.Sparsity.video(), "max_new_tokens": 4}
    files = [write_video(tmp_path / f"{total}.mkv", noise(total, 60, 70, seed=total)) for total in (3, 20)]
    together = sv.generate(case.ours, None, ["where", "what is it"], videos=[[file] for file in files], **settings)
    alone = [
        sv.generate(case.ours, None, question, videos=file, **settings)
        for question, file in zip(("where", "what is it"), files, strict=True)
    ]
    assert together == alone and alone[0] != alone[1]


TURNS = ("what is in the heat", "why")


def test_a_conversation_about_a_video_is_pruned_again_as_fresh_ones_are(case: Case) -> None:
    settings: Any = {"sparsity": sv.Sparsity.v15(keep=40), "max_new_tokens": 4}
    chat, messages = sv.Chat(case.ours, None, videos=film(1), frames=4, **settings), []
    for question in TURNS:
        messages.append({"role": "user", "content": question})
        said = chat.ask(question)
        assert said == sv.generate(case.ours, None, messages, videos=film(1), frames=4, **settings)
        messages.append({"role": "assistant", "content": said})


def test_a_conversation_about_a_video_goes_on_with_the_first_selection(case: Case) -> None:
    """Each answer is what the first prompt's own cache says, decoded on one by one."""
    chat = sv.Chat(
        case.ours, None, videos=film(1), frames=4, selection="first", sparsity="v1.5", max_new_tokens=4, room=64
    )
    first = require_processor(case.ours)([[]], [TURNS[0]], videos=[[film(1)]], sampling=Sampling(4))
    ends = []
    for question in TURNS:
        chat.ask(question)
        ends.append(len(chat.ids))
    length, config = len(first.ids[0]), case.ours.config
    assert chat.ids[:length].tolist() == first.ids[0].tolist()
    run = GenerationRequest(case.ours.params, config, first.ids, first.images, **contract.settings(chat.sparsity))
    ids, lengths = jnp.asarray(run.packed.input_ids), jnp.asarray(run.packed.lengths)
    prompt = contract.embedded(run.params, ids, lengths, run.images, config=config)
    logits, _ = models.forced_logits(run.params, config, run.plan, prompt, chat.ids[None, length:])
    likeliest = logits[0].argmax(-1).tolist()
    for end in ends:
        stop = end - length
        assert chat.ids[end - 4 : end].tolist() == likeliest[stop - 4 : stop]
