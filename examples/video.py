"""A clip, and the embedded model as a Video-LLaVA that answers about it: both towers are its own.

The weights are those of a LLaVA that was trained on single images. As frames it has seen none, nor class tokens, so
this shows that the path from a file to an answer works on real weights, and nothing about Video-LLaVA's own answers.
"""

import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image
from safetensors.flax import load_file, save_file
from transformers import AutoTokenizer

from sparsevlm_jax.data import demo_model

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/video")
model = Path(shutil.copytree(demo_model.path(), out / "model", dirs_exist_ok=True))

tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.add_tokens(["<video>"], special_tokens=True)
template = (model / "chat_template.jinja").read_text()
template = template.replace("<image> {%", "<image> {% elif part['type'] == 'video' %}<video> {%", 1)
tokenizer.save_pretrained(model)
(model / "chat_template.jinja").write_text(template)

config = json.loads((model / "config.json").read_text())
config |= {"model_type": "video_llava", "video_token_index": tokenizer.convert_tokens_to_ids("<video>")}
(model / "config.json").write_text(json.dumps(config))

tensors = {}
for name, tensor in load_file(model / "model.safetensors").items():
    for tower in ("image_tower", "video_tower"):
        tensors[name.replace("vision_tower", tower)] = tensor
save_file(tensors, model / "model.safetensors")

scene = np.asarray(Image.open(demo_model.samples()[0].image).convert("RGB"))
with av.open(str(out / "clip.mkv"), "w") as clip:
    stream = clip.add_stream("ffv1", rate=8)
    stream.height, stream.width, stream.pix_fmt = *scene.shape[:2], "bgr0"
    for step in range(12):  # the camera trembles
        frame = np.roll(scene, (step % 3, step % 4), axis=(0, 1))
        clip.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    clip.mux(stream.encode())
print(f"sparsevlm ask --model {model} --video {out / 'clip.mkv'} --frames 4 --question 'what digit is red?'")
