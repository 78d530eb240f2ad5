"""Your own jax.jit around prefill and decode_step: no processor, no sampling loop, any sharding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparsevlm_jax as sv

config = sv.tiny()  # or model = sv.load("path"); config, params = model.config, model.params
params = sv.init_params(config, jax.random.key(0), jnp.float32)
visual, text, batch = config.tokens_per_image, 32, 8
plan = sv.make_plan(sv.Sparsity.v15(keep_at=[(1, 8), (3, 4)]), config, visual, text)

ids = np.ones((batch, text + visual), np.int32)
ids[:, 4 : 4 + visual] = config.image_token_id
lengths = jnp.full(batch, ids.shape[1])
pixels = jax.random.normal(jax.random.key(1), (batch, 3, config.vision.image_size, config.vision.image_size))


@partial(jax.jit, static_argnames=("config", "plan", "steps"))
def answer(params, ids, lengths, pixels, config, plan, steps=8):
    prompt = sv.embed(params, ids, lengths, pixels, config)
    logits, cache, _ = sv.prefill(params, prompt, config, plan, max_new_tokens=steps)

    def step(carry, _):
        token, cache = carry
        logits, cache = sv.decode_step(params, token, cache, config, plan)
        return (jnp.argmax(logits, -1).astype(jnp.int32), cache), token

    return jax.lax.scan(step, (jnp.argmax(logits, -1).astype(jnp.int32), cache), length=steps)[1].T


rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
sharded = (jax.device_put(array, rows) for array in (ids, lengths, pixels))
print(answer(params, *sharded, config, plan))
