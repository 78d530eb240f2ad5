"""Chat templates: rendered as transformers renders them, and stopped where they would not end."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sparsevlm_jax.checkpoints.llava_original import _CHATML, _MISTRAL, _VICUNA, _template
from sparsevlm_jax.inputs import templates
from tests.hf import CHAT_TEMPLATE

PARTS = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is é 😀 this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a <b> & 'c'"}]},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]
STRINGS = [{"role": "user", "content": "why? <image>"}, {"role": "assistant", "content": " so "}]

SOUND = {
    "llava": CHAT_TEMPLATE,
    "vicuna": _template(_VICUNA),
    "generation": "{% for m in messages %}{% generation %}{% set q = 1 %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{{ q }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(a=1, self='x') %}{% for m in messages %}{% set ns.a = ns.a + loop.index0 %}"
    "{% if loop.last %}{{ ns.a }}{% else %}{% continue %}{% endif %}{% endfor %}{{ ns.self ~ 1 ~ none ~ [1, 'a'] }}",
    "macro": "{% macro f(x, y=2) %}<{{ x }}:{{ y }}>{{ caller() if caller }}{% endmacro %}{{ f(1) }}{{ f('a', y=[1]) }}"
    "{% call f(3) %}in{% endcall %}",
    "slices": "{{ messages[0]['content'][::-1] }}{{ messages[1:] | length }}{{ messages[-1].role | upper }}",
    "strings": "{{ 'a'.center(20) }}|{{ '%05d %s' | format(3, 'x') }}|{{ '{:>5} {a}'.format(1, a='k') }}|"
    "{{ 'a,b'.split(',') | join('-') }}|{{ 'x' * 5 }}{{ 2**10 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 'a\tb'.expandtabs(4) }}",
    "loops": "{{ bos_token }}{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}"
    "{{ loop.revindex }}"
    "{{ m['role'] | capitalize | indent(4, true) }}{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}",
    "dicts": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ dict(a=1) | tojson }}"
    "{{ dict.fromkeys([1, 2]) }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}",
    "captures": "{% filter upper %}abc{% endfilter %}"
    "{% set x %}cap {{ bos_token }}{% endset %}{{ x | trim | replace('c', 'd') }}"
    "{{ nothing }}{{ nothing is defined }}{{ [3, 1] | sort | first }}{{ [1, 2] | sum }}{{ 3.14159 | round(2) }}",
    "whitespace": "{% if messages[0]['role'] == 'system' %}\n    {{- messages[0]['content'] | trim }}\n{%- endif %}\n"
    "   {% for m in messages %}\n  x\n{% endfor %}",
    "recursive": "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}({{ loop(i) }})"
    "{% else %}{{ i }}{% endif %}{% endfor %}",
    "escaping": "{% autoescape true %}{{ '<' ~ 'b' }}{{ '<' | safe ~ '>' }}{% endautoescape %}{{ '<b>' | e }}"
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% with c=3 %}{{ c }}{% endwith %}{{ (1,) }}{{ {'a': [1, (2,)]} }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "error": "{{ raise_exception('no ' ~ 'way') }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "syntax": "{% for %}",
}


def outcome(function: Any, **variables: Any) -> str:
    try:
        return function(**variables)
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("messages", [PARTS, STRINGS], ids=["parts", "strings"])
@pytest.mark.parametrize("source", SOUND.values(), ids=SOUND)
def test_a_template_renders_as_in_transformers(source, messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    def theirs(messages: Any, **variables: Any) -> str:
        return render_jinja_template([messages], chat_template=source, **variables)[0][0]

    given = {"messages": messages, "add_generation_prompt": True, "bos_token": "<s>"}
    ours = outcome(lambda **given: templates.render(source, tools=None, documents=None, **given), **given)
    assert ours == outcome(theirs, **given)


def grown(step: str) -> str:
    return f"{{% set ns = namespace(a='aa') %}}{{% for i in range(60) %}}{{% set ns.a = {step} %}}{{% endfor %}}"


def doubled(step: str) -> str:
    return (
        "{% set a0 = ['xx'] %}" + "".join(f"{{% set a{i + 1} = {step.format(i)} %}}" for i in range(60)) + "{{ a60 }}"
    )


BOMBS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "conditions of loops": "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in range(5) recursive %}{% if loop.depth < 12 %}{{ loop(range(5)) }}"
    "{% endif %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "lists in a loop": "{% for i in range(100000) %}{% set x = range(100000) | list %}{% endfor %}",
    "center": "{{ 'a'.center(10**10) }}",
    "center, a filter": "{{ 'a' | center(10**10) }}",
    "center, mapped": "{{ ['a'] | map('center', 10**10) | list }}",
    "center, a block": "{% filter center(10**10) %}a{% endfilter %}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "indent, many lines": "{% set x = 'a\n' * 100000 %}{{ x | indent(width=10**4) }}",
    "tojson": "{{ [1] | tojson(indent=10**10) }}",
    "tojson, a text": "{{ [1, [2]] | tojson(indent='x' * 400000) }}",
    "tojson, separators": "{{ [1, 2] | tojson(separators=('x' * 400000, 'y')) }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of a list": "{{ 10**10 * [1] }}",
    "power": "{{ 10**(10**10) }}",
    "large integers": "{% set ns = namespace(a=9) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "round": "{{ 1.5 | round(10**9, 'floor') }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "sum": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "width, a filter": "{{ '%10000000000d' | format(1) }}",
    "width, an argument": "{{ '%*d' % (10**10, 1) }}",
    "width, braces": "{{ '{:10000000000}'.format(1) }}",
    "width, nested braces": "{{ '{:{w}}'.format(1, w='1' ~ '0' * 10) }}",
    "width, a map": "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "precision": "{{ '%.10000000000f' % 1.5 }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "doubling": grown("ns.a ~ ns.a"),
    "doubling, plus": grown("ns.a + ns.a"),
    "doubling, join": grown("[ns.a, ns.a] | join(ns.a)"),
    "doubling, a method": grown("ns.a.join([ns.a, ns.a])"),
    "doubling, format": grown("'%s%s' % (ns.a, ns.a)"),
    "doubling, replace": grown("ns.a | replace('a', ns.a)"),
    "doubling, replace nothing": grown("ns.a.replace('', ns.a)"),
    "doubling, lists": doubled("[a{0}, a{0}]"),
    "doubling, dicts": doubled("{{'a': a{0}, 'b': a{0}}}"),
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 10000}) }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "a namespace in itself": "{% set a = namespace() %}{% set a.x = [a] %}{{ a }}",
    "output": "{% for i in range(90000) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}",
    "copies": "{% set s = 'x' * 400000 %}{{ [" + ", ".join(f"s[{i}:]" for i in range(3_000)) + "] | length }}",
    "terms": "{% set s = 'x' * 400000 %}{{ " + " ~ ".join(["s"] * 1_000) + " }}",
    "source": "x" * 100_000,
    "nesting": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "blocks": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_stopped(source, limited):
    with pytest.raises(Exception) as raised:
        templates.render(source, messages=PARTS)
    assert not isinstance(raised.value, MemoryError)


@pytest.fixture(scope="module")
def limited():
    """Holds this process to a gigabyte more than it has, so that a bomb ends a test and not the machine."""
    import resource

    import psutil

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_000_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_threads_do_not_share_a_meter():
    program = f"""
from concurrent.futures import ThreadPoolExecutor
from sparsevlm_jax.inputs import templates
source = {grown("ns.a ~ 'a'")!r} + "{{{{ ns.a }}}}"
with ThreadPoolExecutor(8) as pool:
    assert set(pool.map(lambda _: templates.render(source), range(400))) == {{"a" * 62}}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("content", ["be short", [{"type": "text", "text": "be short"}]])
@pytest.mark.parametrize(
    "turns, said",
    [
        (_VICUNA, "be short USER: why? ASSISTANT:"),
        (_MISTRAL, "be short\n[INST] why? [/INST]"),
        (
            _CHATML,
            "<|im_start|>system\nbe short<|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n",
        ),
    ],
    ids=["vicuna", "mistral", "chatml"],
)
def test_a_system_text_takes_the_place_of_the_written_templates_own(turns: Any, said: str, content: Any) -> None:
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "why?"}]
    settings = {"tools": None, "documents": None, "add_generation_prompt": True, "eos_token": "</s>"}
    assert templates.render(_template(turns), messages=messages, **settings) == said
