"""What XLA gets to see: static shapes, one program per layout, no L × L values where tokens are pruned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Plan, Prompt, Sparsity, abstract_params, make_plan, prefill, sparsity, tiny
from sparsevlm_jax.aot.programs import Prompts, lowered
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.generation.loop import LoopConfig, SamplingParams, decode, start
from sparsevlm_jax.pruning.methods.sparsevlm import numerical_rank
from tests import models

MODEL = models.config(layers=4)
# No other size of the model is as large as the shortest of these sequences.
TEXT, VISUAL = 37, 150
SETTINGS: dict[str, Any] = {
    "v1.5": {"keep_at": ((0, 90), (2, 41))},
    "v2.0": {"keep_at": ((0, 90), (2, 41)), "heads": 2},
    "v1": {"layers": (0, 2), "scale": 1.5, "bias": 1.0},
}
TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


def plan_of(method: str) -> Plan:
    return make_plan(sparsity(method, **SETTINGS[method]), MODEL, VISUAL, TEXT)


def shapes(dtype: str = "float32", batch: int = 1) -> tuple[Any, Prompt]:
    """Parameters and a prompt, as shapes."""
    prompt = jax.eval_shape(partial(models.prompt, [(9, 150, 28)] * batch, text=TEXT, visual=VISUAL, dtype=dtype))
    return abstract_params(MODEL, jnp.dtype(dtype)), prompt


def programs(method: str) -> dict[str, Any]:
    """The two programs of an answer, lowered from ids and pixels."""
    plan = make_plan(sparsity(method, **SETTINGS[method]), MODEL, 16, 32)
    common = {"config": MODEL, "decoding": LoopConfig(room=16, greedy=False, end_tokens=(2,))}
    static = common | {"plan": plan}
    args = jax.eval_shape(
        lambda: (
            jnp.zeros((1, 48), jnp.int32),
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, 3, 56, 56), jnp.float32),
            jax.random.split(jax.random.key(0), 1),
            SamplingParams(jnp.float32(1), jnp.float32(1)),
        )
    )
    weights = abstract_params(MODEL, jnp.dtype("float32"))
    state = jax.eval_shape(partial(start, **static), weights, *args)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        "start": start.lower(weights, *args, **static),
        "decode": decode.lower(weights, state, limit, args[-1], **common, stops=plan.stops),
    }


@contextmanager
def events() -> Iterator[list[str]]:
    """Records what jax traces and compiles."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in (TRACED, COMPILED):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


FRESH = models.config(layers=2, image_size=28)  # used nowhere else: nothing of it has been compiled before


def ask(before: int, after: int, tokens: int, seed: int) -> list[int]:
    """One question about one image."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, 180, count) for count in (before, after)]
    image = np.full(FRESH.tokens_per_image, FRESH.image_token_id)
    (answer,) = generate_ids(
        models.params(FRESH),
        FRESH,
        [np.concatenate([words[0], image, words[1]]).astype(np.int32)],
        random.normal(0, 1, (1, 3, 28, 28)).astype(np.float32),
        sparsity=sparsity("v1.5", keep_at=((0, 2),)),
        max_new_tokens=tokens,
        end_tokens=(),
    ).tokens
    return answer


BUILT: Counter[str] = Counter()


def _count(event: str, duration_secs: float, **details: str | int) -> None:
    BUILT[str(details.get("fun_name"))] += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_count)


def sizes() -> np.ndarray:
    """How many programs `start` and `decode` have been compiled to."""
    return np.array([BUILT["jit(start)"], BUILT["jit(decode)"]])


def test_a_layout_is_compiled_once_and_another_question_in_its_bucket_compiles_nothing() -> None:
    known = sizes()
    with events() as first:
        ask(5, 9, tokens=6, seed=0)
    assert {TRACED, COMPILED} <= set(first)  # the listener hears
    assert np.all(sizes() - known == 1)
    with events() as second:
        answer = ask(3, 20, tokens=9, seed=1)
    assert second == []
    assert len(answer) == 9
    assert np.all(sizes() - known == 1)
    ask(5, 40, tokens=6, seed=2)  # the next bucket
    assert np.all(sizes() - known == 2)


def ask_pruned(settings: Sparsity, **options: Any) -> None:
    """One question about one image, under any settings."""
    random = np.random.default_rng(0)
    image = np.full(FRESH.tokens_per_image, FRESH.image_token_id)
    generate_ids(
        models.params(FRESH),
        FRESH,
        [np.concatenate([random.integers(0, 180, 5), image, random.integers(0, 180, 9)]).astype(np.int32)],
        random.normal(0, 1, (1, 3, 28, 28)).astype(np.float32),
        **({"sparsity": settings, "max_new_tokens": 3, "end_tokens": (5,)} | options),
    )


@pytest.mark.parametrize("method", ["v1.5", "random"])
def test_another_seed_compiles_nothing(method: str) -> None:
    settings = [sparsity(method, keep_at=((0, 2),)).changed(seed=seed) for seed in (3, 4)]
    ask_pruned(settings[0], temperature=1.0, key=jax.random.key(3))
    known, key = sizes(), jax.random.key(4)
    with events() as seen:
        ask_pruned(settings[1], temperature=0.5, key=key)
    assert seen == []
    assert np.all(sizes() == known)


def test_methods_that_draw_nothing_have_no_seed_in_their_settings() -> None:
    assert sparsity("v1.5", seed=1) == sparsity("v1.5")
    assert sparsity("random", seed=1) != sparsity("random")


def test_a_method_that_draws_takes_its_seed_traced() -> None:
    plan = make_plan(sparsity("random", keep_at=((0, 9),), seed=4), FRESH, 16, 12)
    unseeded = replace(plan, sparsity=replace(plan.sparsity, seed=None))
    batch, weights = models.prompt([(3, 16, 5)], text=12, visual=16), models.params(FRESH)
    run = partial(prefill, config=FRESH, plan=unseeded, max_new_tokens=0)
    traced: Any = jax.jit(run, compiler_options=models.QUICK)
    of_plan = models.compiled_prefill(FRESH, plan, 0)(weights, batch)[0]
    np.testing.assert_array_equal(traced(weights, batch, seed=jnp.uint32(4))[0], of_plan)
    assert np.any(np.asarray(traced(weights, batch, seed=jnp.uint32(5))[0]) != np.asarray(of_plan))
    assert traced._cache_size() == 1
    with pytest.raises(ValueError, match="give prefill a seed"):
        jax.eval_shape(run, weights, batch)


def test_another_budget_with_equal_cache_lengths_decodes_in_the_same_program() -> None:
    """What fewer kept and more merged tokens leave is as long: only the prefill is another program."""
    fewer = Sparsity.v15(keep_at=[(0, 1)])  # one stays, one is merged
    more = fewer.changed(keep_at=((0, 2),), recycle=False)
    ask_pruned(fewer)
    known = sizes()
    ask_pruned(more)
    assert (sizes() - known).tolist() == [1, 0]


def custom_calls(lowered: Any) -> set[str]:
    return set(re.findall(r"custom_call @(\w+)", lowered.as_text()))


@pytest.mark.parametrize("method", SETTINGS)
def test_programs_have_no_dynamic_dimension(method: str) -> None:
    for name, program in programs(method).items():
        assert re.findall(r"tensor<[^>]*\?[^>]*>", program.as_text()) == [], name


@pytest.mark.parametrize("method", SETTINGS)
def test_programs_have_no_host_callback(method: str) -> None:
    talks = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0)
    assert any("callback" in target for target in custom_calls(talks))  # this is how one would look
    for name, program in programs(method).items():
        assert not [target for target in custom_calls(program) if "callback" in target], name
        assert not re.search(r"infeed|outfeed|send|recv", program.as_text()), name


class Memory(NamedTuple):
    """XLA's account of both programs, and the bytes of the cache between them."""

    start: Any
    decode: Any
    cache: int


def _memory(method: str, new_tokens: int) -> Memory:
    prompts = Prompts(2, (tiny().image_layout(tiny().fullest_image),), 20, new_tokens)
    made = lowered(tiny(), sparsity(method), prompts, "float32", jax.devices()[0], "cpu")
    start, decode = (each.compile().memory_analysis() for each in (made.start, made.decode))
    return Memory(start, decode, made.cache)


@pytest.mark.parametrize("method", ["dense", "v1.5"])
def test_no_program_holds_the_cache_twice(method: str) -> None:
    """By XLA's own account: what room for new tokens adds to the cache, it adds to no temporary of the prefill, and in
    the decoding loop no more than a layer's part of it."""
    config = tiny()
    few, many = (_memory(method, new_tokens) for new_tokens in (16, 2000))
    more = many.cache - few.cache
    assert more > 10 * few.start.temp_size_in_bytes
    assert many.start.temp_size_in_bytes <= few.start.temp_size_in_bytes
    taken = many.decode
    assert taken.alias_size_in_bytes >= many.cache
    assert taken.output_size_in_bytes - taken.alias_size_in_bytes < 1000
    assert taken.temp_size_in_bytes - few.decode.temp_size_in_bytes < 1.2 * more / config.text.num_hidden_layers


def test_decoding_donates_its_caches() -> None:
    text = programs("v1.5")["decode"].as_text()
    donated = re.findall(r"tensor<([\dx]+)xf32> {[^}]*(?:tf.aliasing_output|jax.buffer_donor)", text)
    plan = make_plan(sparsity("v1.5", **SETTINGS["v1.5"]), MODEL, 16, 32)
    expected = [f"1x{32 + visual + 16}x4x16" for visual in plan.entering() for _ in ("key", "value")]
    assert sorted(donated) == sorted(expected)


def values(jaxpr: Any, scopes: frozenset[str] = frozenset()) -> Iterator[tuple[frozenset[str], tuple[int, ...]]]:
    """Named scopes and shape of every value that a jaxpr computes, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        inside = scopes | set(re.split(r"[/()]", str(equation.source_info.name_stack)))
        for value in equation.outvars:
            yield inside, getattr(value.aval, "shape", ())
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from values(inner, inside)


def primitives(jaxpr: Any, scopes: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str], Any]]:
    """Every primitive that a jaxpr and those inside it bind, its named scopes, and its first result."""
    for equation in jaxpr.eqns:
        inside = scopes | set(re.split(r"[/()]", str(equation.source_info.name_stack)))
        yield equation.primitive.name, inside, equation.outvars[0].aval
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, inside)


@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
def test_a_pruning_point_sorts_once_beside_its_top_k_and_gathers_hidden_states_once(method: str) -> None:
    """Each of these is a kernel, or two, on a GPU."""
    plan = plan_of(method)
    run = partial(prefill, config=MODEL, plan=plan, max_new_tokens=4)
    found = list(primitives(jax.make_jaxpr(run)(*shapes()).jaxpr))
    points = len(plan.stages) - 1
    for scope, name, each in (
        ("score", "sort", 0),  # raters are carried by their places
        ("select", "top_k", 1),
        ("recycle", "top_k", 2 if method == "v1.5" else 0),  # the nearest neighbours, and the centres
        ("rebuild", "sort", 1),
    ):
        assert sum(p == name and scope in scopes for p, scopes, _ in found) == each * points, (scope, name)
    gathered = [a.shape for p, scopes, a in found if p == "gather" and "rebuild" in scopes and a.shape[-1] == 64]
    assert len(gathered) == points, gathered


def long_axes(shape: tuple[int, ...], plan: Plan) -> int:
    shortest = TEXT + min(stage.visual for stage in plan.stages)
    return sum(size >= shortest for size in shape)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("method", SETTINGS)
def test_pruning_makes_no_value_with_two_axes_of_sequence_length(method: str, trace: bool) -> None:
    plan = plan_of(method)
    run = partial(prefill, config=replace(MODEL, attention="xla"), plan=plan, trace=trace, max_new_tokens=4)
    found = list(values(jax.make_jaxpr(run)(*shapes(batch=2)).jaxpr))
    assert max(long_axes(shape, plan) for scopes, shape in found if "attend" in scopes) == 2  # dense attention has it
    for scope in ("rate", "score", "select", "recycle"):
        inside = [shape for scopes, shape in found if scope in scopes]
        assert inside or (scope, method) == ("recycle", "v2.0")
        assert max((long_axes(shape, plan) for shape in inside), default=0) <= 1, scope


@pytest.mark.parametrize("trace", [False, True])
def test_no_array_says_of_every_token_what_share_of_each_original_one_it_holds(trace: bool) -> None:
    plan = plan_of("v1.5")
    run = partial(prefill, config=replace(MODEL, attention="xla"), plan=plan, trace=trace, max_new_tokens=4)
    found = values(jax.make_jaxpr(run)(*shapes()).jaxpr)
    assert not any(shape[-2:] == (TEXT + VISUAL, VISUAL) for _, shape in found)


def test_without_a_trace_nothing_is_computed_for_it() -> None:
    model = models.config(layers=2)
    plan = make_plan(sparsity("v1.5", layers=(0,)), model, 40, 24)
    batch = models.prompt([(7, 40, 17)], text=24, visual=40)

    def cost(run: Any) -> tuple[float, float]:
        counts: Any = jax.jit(run, compiler_options=models.QUICK).lower(models.params(model), batch).compile()
        return counts.cost_analysis()["flops"], counts.cost_analysis()["bytes accessed"]

    def run(weights: Any, prompt: Prompt, trace: bool) -> Any:
        return prefill(weights, prompt, model, plan, trace, max_new_tokens=4)

    plain, traced = cost(partial(run, trace=False)), cost(partial(run, trace=True))
    # Of the traced program, XLA leaves what logits and cache need: there is nothing less than that.
    needed = cost(lambda weights, prompt: run(weights, prompt, trace=True)[:2])
    assert plain == needed
    assert plain[1] < traced[1]
    assert plain[1] < traced[1]
    assert jax.eval_shape(partial(run, trace=False), models.params(model), batch)[2] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
def test_the_pruned_prefill_exports_for_cuda_and_tpu(method: str, dtype: str) -> None:
    run = partial(prefill, config=replace(MODEL, attention="xla"), plan=plan_of(method), max_new_tokens=4)
    exported = jax.export.export(jax.jit(lambda *args: run(*args)[:2]), platforms=("cuda", "tpu"))(*shapes(dtype))
    assert exported.platforms == ("cuda", "tpu")
    assert exported.out_avals[0].shape == (1, MODEL.text.vocab_size)
    assert {str(leaf.dtype) for leaf in exported.out_avals[1:9]} == {dtype}


def test_singular_values_of_a_batch_are_asked_one_row_at_a_time():
    """jax 0.10 divides a batch among the threads of a pool and waits in one of them: two programs hung each other."""
    shapes = jax.ShapeDtypeStruct((5, 3, 8), jnp.float32), *[jax.ShapeDtypeStruct((5,), jnp.int32)] * 2
    calls = re.findall(r"custom_call @lapack_sgesdd\w*\(.*", jax.jit(numerical_rank).lower(*shapes).as_text())
    assert calls and all("(tensor<3x8xf32>)" in call for call in calls)
