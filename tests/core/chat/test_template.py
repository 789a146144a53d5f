"""What templates are told and what they can say, as transformers has it."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
import small_templates as small

from mlxlora_core.chat import ChatTemplate
from mlxlora_core.chat.template import DATE
from mlxlora_core.errors import DataError

ASKED = [{"role": "user", "content": "Füße <b> \u2028"}]


def rendered(source: str, messages: Any = ASKED, tools: Any = (), prompt: bool = False, **more: Any) -> str:
    return ChatTemplate(source, small.SPECIALS).render(messages, tools, prompt, **more)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s>"),
        ("{{ tools }} {{ documents }} {{ add_generation_prompt }}", "None None False"),
        ("{{ tools is none }}{{ nothing is defined }}", "TrueFalse"),
        ("a\n{% if true %}\n  b\n{% endif %}\nc", "a\n  b\nc"),  # trim_blocks, lstrip_blocks
        ("a\n  {% if true %}x{% endif %}\nb", "a\nxb"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Füße <b> \u2028"}]'),
        ("{{ {'b': 1, 'a': [none, true]} | tojson }}", '{"b": 1, "a": [null, true]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% if i > 3 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "023",
        ),
        ("{{ messages[0]['content'] }}", "Füße <b> \u2028"),
        ("{{ messages[0].content[::-1][:3] }}", "\u2028 >"),
        ("{{ '<' ~ 1 ~ none ~ nothing }}", "<1None"),
        ("{{ 'a%sb' % 'x' }}{{ '%05.1f' | format(3.14) }}{{ '{}-{b:>3}'.format(1, b=2) }}", "axb003.11-  2"),
        ("{{ 'a,b'.split(',') | join('+') }}{{ 'a b'.title() }}{{ ' x '.strip() }}", "a+bA Bx"),
        ("{{ [3, 1, 2] | sort | reverse | list }}{{ [1, 2] | map('string') | list }}", "[3, 2, 1]['1', '2']"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}", "['user']"),
        ("{{ 'a' in 'abc' }}{{ 1 < 2 < 3 }}{{ [1, 2] == [1, 2] }}{{ 2 not in [1] }}", "TrueTrueTrueTrue"),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}"
            "{% endfor %}{{ ns.n }}",
            "6",
        ),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}", "1213"),
        ("{% macro f() %}[{{ caller(1) }}]{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}", "[1]"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter lower %}AB{% endfilter %}", "A1ab"),
        (
            "{% for a in [1, 2, 3] %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}"
            "{% endfor %}",
            "1False32False313True32",
        ),
        (
            "{% for a in [[1], []] recursive %}{{ a | length }}"
            "{{ loop(a) if a and a[0] is iterable }}{% endfor %}",
            "10",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for a in [1, 2, 3, 4] if a is even %}{{ a }}{{ loop.length }}{% endfor %}", "2242"),
        ("{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ a }}{% endraw %}{# no #}", "1{{ a }}"),
        (
            "{{ dict(a=1) }}{{ dict([['b', 2]]).b }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}",
            "{'a': 1}212",
        ),
        (
            "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 7 / 2 }}{{ -7 | abs }}{{ '5' | int + 1 }}"
            "{{ 2.5 | round }}",
            "3183.5762.0",
        ),
        ("{{ [1, 2, 3] | sum }}{{ [1, 2] | min }}{{ 'abc' | length }}{{ [1, 1] | unique | list }}", "613[1]"),
        (
            "{{ 'a\nb' | indent(2) }}{{ 'x' | default('d') }}{{ nothing | default('d') }}{{ 'ab' | first }}",
            "a\n  bxda",
        ),
        ("{% generation %}a{{ 1 }}{% endgeneration %}", "a1"),
        ("{{ 'a' if false }}{{ 'a' if true else 'b' }}", "a"),
        (
            "{{ [1, 2, 3] | batch(2) | list }}{{ 'a' | center(3) }}|{{ 'aXb' | replace('X', '-') }}",
            "[[1, 2], [3]] a |a-b",
        ),
        (
            "{{ messages[0].nothing }}{{ messages[0].items() | list | length }}"
            "{{ messages | last is mapping }}",
            "2True",
        ),
        ("text\n", "text"),
    ],
)
def test_templates_say_what_jinja_says(source: str, text: str) -> None:
    assert rendered(source) == text


def test_names_are_told_as_they_are_given() -> None:
    assert rendered("{{ enable_thinking }}{{ more.a[0] }}", enable_thinking=True, more={"a": (1,)}) == "True1"
    assert rendered("{{ tools[0].name }}{{ tools | length }}", tools=[{"name": "f"}]) == "f1"
    assert rendered("{{ add_generation_prompt }}", prompt=True) == "True"
    assert rendered("{{ bos_token }}", bos_token="<other>") == "<other>"


def test_a_message_has_nothing_that_is_null() -> None:
    messages = [{"role": "assistant", "content": None, "name": None, "tool_calls": [{"a": None}]}]
    assert json.loads(rendered("{{ messages | tojson }}", messages)) == [
        {"role": "assistant", "tool_calls": [{"a": None}]}
    ]


def test_values_are_of_json() -> None:
    class Text(str):
        def write(self) -> str:
            return "written"

    with pytest.raises(DataError, match="a conversation holds Text, wanted what JSON can say"):
        rendered("{{ messages[0].content.write() }}", [{"role": "user", "content": Text("x")}])
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": (1, 2.5)}]) == "[1, 2.5]"


def test_the_date_is_the_same_every_day() -> None:
    source = "{{ strftime_now('%d %B %Y %H:%M') }}"
    assert rendered(source) == f"{DATE:%d %B %Y} 00:00" == "26 July 2024 00:00"
    assert ChatTemplate(source, date=date(2026, 1, 2)).render(ASKED) == "02 January 2026 00:00"


def test_what_decides_the_text_is_in_the_fingerprint() -> None:
    plain = ChatTemplate("a")
    others = [
        ChatTemplate("b"),
        ChatTemplate("a", {"bos_token": "<s>"}),
        ChatTemplate("a", date=date(2026, 1, 1)),
        ChatTemplate("a", tools_source="b"),
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert plain.fingerprint == ChatTemplate("a", where="elsewhere").fingerprint


def test_tools_may_have_a_template_of_their_own() -> None:
    template = ChatTemplate("plain", tools_source="tools: {{ tools | length }}")
    assert template.render(ASKED) == "plain"
    assert template.render(ASKED, [{}, {}]) == "tools: 2"


def test_the_same_template_renders_in_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    talks = [[{"role": "assistant", "content": str(i) * 50}] * 20 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        marked = list(pool.map(lambda talk: template.marked(talk, (), False, ("<", ">")), talks * 5))
        plain = list(pool.map(template.render, talks * 5))
    assert plain == [talk[0]["content"] * 20 for talk in talks * 5]
    assert marked == [f"<{talk[0]['content']}>" * 20 for talk in talks * 5]
