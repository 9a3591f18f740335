"""Chat templates that do not come to an end, or make more than there is room for."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from traceback import walk_tb

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpc_distkv.model import template_sandbox, template_sizes
from hpc_distkv.model.chat import ChatTemplate
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.template_sandbox import Sandbox
from hpc_distkv.model.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
LOOP = "{% for i in range(99999) %}"
GROWS = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"
BIG = "{% set x = 'a\t' * 10_000 %}"
NESTED = GROWS.replace("START", "'a'").replace("STEP", "[ns.x, ns.x]")
TWICE = NESTED + "{% set x = ns.x %}{% set ns.x = 'a' %}" + NESTED.partition("%}")[2]
"""The same value, made a second time."""
TOO_LONG = {
    "text times": "{{ 'a' * 10**10 }}",
    "times text": "{{ 10**10 * 'a' }}",
    "list": "{{ [1] * 10**10 }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent with a width": "{{ '%*d' % (10**10, 1) }}",
    "format": "{{ '{:>10000000000}'.format('a') }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "batch": "{{ [1, 2] | batch(10**10, 'x') | list }}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "output": f"{LOOP}{'x' * 10_000}{{% endfor %}}",
    "output of a macro": f"{{% macro f() %}}{LOOP}{'x' * 10_000}{{% endfor %}}{{% endmacro %}}"
    "{{ f() | length }}",
}
MULTIPLIES = {
    "replace": "{{ x.replace('a', x) }}",
    "replace of nothing": "{{ x.replace('', x) }}",
    "replace filter": "{{ x | replace('a', x) }}",
    "replace of many": "{{ [x] | map('replace', 'a', x) | first }}",
    "replace by another name": "{% set f = x.replace %}{{ f('a', x, 9_000) }}",
    "join": "{{ x.join(x) }}",
    "join of a generator": "{{ x.join(x | map('upper')) }}",
    "join filter": "{{ x | join(x) }}",
    "join of attributes": "{{ ([{'b': x}] * 9_000) | join('', attribute='b') }}",
    "expandtabs": "{{ x.expandtabs(20_000) }}",
    "expandtabs by name": "{{ x.expandtabs(tabsize=20_000) }}",
    "indent": "{{ x.replace('\t', '\n') | indent(20_000) }}",
    "indent by text": "{{ x.replace('\t', '\n') | indent(x) }}",
    "wordwrap": "{{ x | wordwrap(1, true, x) }}",
    "wordwrap by name": "{{ x | wordwrap(1, wrapstring=x) }}",
    "list": "{{ [x] * 10_000 }}",
    "list of lists": "{% set y = [[1] * 10_000] * 10_000 %}{{ y }}",
    "text of lists": "{{ ([[1] * 10_000] * 10_000) | string }}",
    "dict": "{{ dict.fromkeys(range(10_000), x) }}{{ {}.fromkeys(range(10_000), x) }}",
    "values": "{{ {}.fromkeys(range(10_000), x).values() }}",
    "tojson": "{{ ([x] * 10_000) | tojson }}",
    "tojson with an indent": "{{ ([0] * 10_000) | tojson(indent=20_000) }}",
    "tojson with separators": "{{ ([0] * 10_000) | tojson(separators=(x, x)) }}",
    "sum": "{{ ([[0] * 10_000] * 10_000) | sum(start=[]) | length }}",
    "many fields": "{{ ('%9999d' * 10_000) % (([1] * 10_000) | list) }}",
    "a field many times": "{{ ('%(a)s' * 10_000) % {'a': x} }}",
    "fields with a width beside": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ ('%(a)s' * 10_000) | format(a=x) }}",
    "format": "{{ ('{0}' * 10_000).format(x) }}",
    "format of widths": "{{ ('{0:9999}' * 10_000).format(1) }}",
    "format of a given width": "{{ '{:{}}'.format(1, 10**10) }}",
    "format of a map": "{{ ('{a}' * 10_000).format_map({'a': x}) }}",
    "format of an attribute": "{{ ('{0.y}' * 10_000).format(namespace(y=x)) }}",
    "format of lists": "{{ '{!r:}'.format([x] * 10_000) }}",
    "nested": NESTED + "{{ ns.x }}",
    "nested ~": NESTED + "{{ '' ~ ns.x }}",
    "nested %": NESTED + "{{ '%s' % ns.x }}",
    "nested % of many": NESTED + "{{ '%s%s' % (1, ns.x) }}",
    "nested string": NESTED + "{{ ns.x | string | length }}",
    "nested join": NESTED + "{{ ns.x | join }}",
    "nested tojson": NESTED + "{{ ns.x | tojson }}",
    "nested tojson with an indent": NESTED + "{{ ns.x | tojson(indent=1) }}",
    "nested dicts": NESTED.replace("[ns.x, ns.x]", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
    "nested tuples": NESTED.replace("[ns.x, ns.x]", "(ns.x, ns.x)") + "{{ ns.x | upper }}",
    "nested words": NESTED + "{{ raise_exception(ns.x) }}",
    "nested ==": TWICE + "{{ x == ns.x }}",
    "nested eq": TWICE + "{{ x is eq(ns.x) }}",
    "nested in": TWICE + "{{ x in [1, ns.x] }}",
    "nested select": TWICE + "{{ [x] | select('in', [ns.x]) | list }}",
    "time": "{{ strftime_now('%c' * 10_000_000) }}",
}
"""Of which no part is large."""
LEFT_OUT = {
    "translate": "{{ x.translate({97: x}) }}",
    "bytes": "{{ x.encode().replace('a'.encode(), x.encode()) }}",
    "numbers as bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "urlize": "{{ ('www.a.org ' * 10_000) | urlize(target=x) }}",
    "escaped": "{{ ('{0}' * 10_000) | escape.format(x) }}{{ (('{0}' * 10_000) | e).format(x) }}",
}
ENDLESS = {
    "loops": f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
    "conditions": f"{LOOP}{LOOP[:-3]} if false %}}{{% endfor %}}{{% endfor %}}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for a in [60] recursive %}{% if a %}{{ loop([a - 1, a - 1]) }}{% endif %}"
    "{% endfor %}",
}
BROKEN = {
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop without end": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "half a surrogate": "{{ raise_exception('a\\ud83d') }}",
    "many lines": "{{ raise_exception('a\\nb' * 10000) }}",
    "squares": GROWS.replace("START", "3").replace("STEP", "ns.x * ns.x"),
}
DOES_NOT_COMPILE = {
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if true %}" * 500 + "{% endif %}" * 500,
    "deep loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "thousands of digits": "{{ " + "9" * 5000 + " }}",
    "a megabyte": "x" * (2 << 20),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)


def chat_of(model: Path, folder: Path, template: str) -> ChatTemplate:
    shutil.copy(model / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return ChatTemplate(folder, Tokenizer(folder))


def refused(chat: ChatTemplate) -> str:
    """What the user hears, soon."""
    began = time.process_time()
    with pytest.raises(ModelError) as error:
        chat.render(HELLO)
    assert time.process_time() - began < 5
    message = str(error.value)
    message.encode()
    assert len(message.splitlines()) == 1
    assert len(message) < 1200
    return message


@pytest.mark.parametrize("template", TOO_LONG.values(), ids=TOO_LONG)
def test_nothing_grows_beyond_a_limit(template: str, tiny_model: Path, tmp_path: Path) -> None:
    assert "the chat template makes" in refused(chat_of(tiny_model, tmp_path, template))


@pytest.mark.parametrize("template", MULTIPLIES.values(), ids=MULTIPLIES)
def test_what_multiplies_is_refused_before_it_is_made(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    chat = chat_of(tiny_model, tmp_path, BIG + template)
    tracemalloc.start()
    try:
        said = refused(chat)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * template_sizes.LONGEST
    finally:
        tracemalloc.stop()
    assert "the chat template makes" in said


@pytest.mark.parametrize("template", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_would_multiply_is_not_there(template: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"refused the messages|does not compile: No filter"):
        chat_of(tiny_model, tmp_path, BIG + template).render(HELLO)


@pytest.mark.parametrize("step", ["ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 2"])
@pytest.mark.parametrize("start", ["'aa'", "[1, 2]"])
def test_what_doubles_has_an_end(
    start: str, step: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sizes, "LONGEST", 10_000)
    template = GROWS.replace("START", start).replace("STEP", step)
    said = refused(chat_of(tiny_model, tmp_path, template))
    assert "the chat template makes more than 10000 characters" in said


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_has_so_much_time_and_no_row_waits_for_it_again(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    chat = chat_of(tiny_model, tmp_path, template)
    assert "did not come to an end in 0.2 s" in refused(chat)
    began = time.process_time()
    assert "did not come to an end in 0.2 s" in refused(chat)
    assert time.process_time() - began < 0.1


def test_rows_that_are_refused_alike_leave_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    chat = chat_of(tiny_model, tmp_path, ENDLESS["loops"])
    refused(chat)
    errors = []
    for _ in range(3):
        with pytest.raises(ModelError) as error:
            chat.render(HELLO)
        errors.append(error.value)
    assert len(set(map(id, errors))) == 3
    assert len({len(list(walk_tb(error.__traceback__))) for error in errors}) == 1


def test_after_a_row_that_takes_too_long_others_are_rendered(
    tiny_model: Path, tmp_path: Path
) -> None:
    template = "{% for a in messages[0].content %}{% for b in messages[0].content %}{% endfor %}"
    chat = chat_of(tiny_model, tmp_path, template + "{% endfor %}done")
    with pytest.raises(ModelError, match="did not come to an end"):
        chat.render([{"role": "user", "content": "x" * 30_000}])
    assert chat.render(HELLO) == "done"


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_whatever_a_template_does_is_one_sentence(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    refused(chat_of(tiny_model, tmp_path, template))


@pytest.mark.parametrize("template", DOES_NOT_COMPILE.values(), ids=DOES_NOT_COMPILE)
def test_what_does_not_compile_is_found_at_the_start(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"does not compile|more than 1048576 characters"):
        chat_of(tiny_model, tmp_path, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 ~ 2 ~ 'a' ~ none ~ missing }}",
        "{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
        "{% for x in [] %}{% else %}none{% endfor %}",
        "{% for x in [] if x %}{{ x }}{% else %}none{% endfor %}",
        "{% for a, b in {'x': [1, [2]]}.items() %}{{ a }}{{ b }}{{ loop.index0 }}{% endfor %}",
        "{% for x in [[1, [2]], [3]] recursive %}{{ loop.depth }}"
        "{{ x if x is number else loop(x) }}{% endfor %}",
        "{{ '%s-%05d' | format(1, 2) }}{{ '%s' % 3 }}{{ '{:>4}'.format('a') }}",
        "{{ [3, 4] | join(',') }}{{ 'a' | center(5) }}{{ 'ab' * 3 }}{{ [1] + [2] }}",
        "{{ 'a-b'.replace('-', '+') }}{{ 'aaa' | replace('a', 'b', 2) }}",
        "{{ ', '.join(['a', 'b']) }}{{ 'x'.join({'a': 1}) }}{{ 'a\tb'.expandtabs(4) }}",
        "{{ 'a'.zfill(3) }}{{ 'aa'.replace('a', '', 1) }}{{ [[1]] | sum(start=[]) }}",
        "{{ messages | join('|', attribute='role') }}{{ [1, [2]] | join }}{{ 'abc' | join(1) }}",
        "{{ '{0[a]!r:>4}{b.x}'.format({'a': 'c'}, b=namespace(x=5)) }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{{ '%(a)5.1f%%' % {'a': 2} }}{{ '%d' % 1700000000 }}{{ '%*d' % (4, 1) }}",
        "{{ 'a\nb' | indent }}{{ 'a b' | wordwrap(1) }}{{ [1, 2, 3] | batch(2, 0) | list }}",
        "{{ [[2, 'a'], [1, 'b']] | sort }}{{ messages }}{{ messages[0] ~ none }}",
        "{% set x = [1] %}{{ x == [1] }}{{ x != x }}{{ 1 in x }}{{ x in [x] }}{{ 1 < 2 < 3 }}",
        "{% set x = [1] %}{{ x is eq(x) }}{{ [x, 2] | select('in', [x]) | list }}{{ x[0] < 2 }}",
        "{{ 2 ** 10 }}{{ 7 % 4 }}{{ 8 % 10 ** 9 }}{{ -3 * 1.5 }}{{ 3 + 4 }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{% macro f(x) %}<{{ x }}>{{ caller() }}{% endmacro %}"
        "{% call f('a') %}b{% endcall %}{% set c %}{{ 1 }}d{% endset %}{{ c }}",
    ],
)
def test_other_templates_are_rendered_as_in_the_plain_sandbox(template: str) -> None:
    plain = ImmutableSandboxedEnvironment().from_string(template).render(messages=HELLO)
    sandbox = Sandbox()
    sandbox.bound_filters()
    with sandbox.limited():
        assert sandbox.from_string(template).render(messages=HELLO) == plain
