"""Templates that loop, grow or reach for the inside of Python: each is stopped, in bounded time and memory.

What is not stopped here does not come back, or ends the whole test run: that is what these tests find.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxlora_core.chat import ChatTemplate, allowance
from mlxlora_core.chat.template import MOST_CHARACTERS
from mlxlora_core.errors import DataError, ExitCode, MlxloraError, ModelError, SafetyError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
MEMORY_BYTES = 200 << 20  # that a template may take, its compilation included

# A value that holds the one before it twice: small to keep, endless to go through.
TWICE = "{% set ns = namespace(a=[], b=[], t=()) %}{% for i in range(90) %}" + "".join(
    f"{{% set ns.{name} = {begin}ns.{name}, ns.{name}{end} %}}"
    for name, begin, end in (("a", "[", "]"), ("b", "[", "]"), ("t", "(", ")"))
)
TWICE += "{% endfor %}"
LONG = "{% set long = 'a' * 500000 %}"

LOOPS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "loops that go on": "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}"
    "{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10**9) %}{% endfor %}",
    "a macro in itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros as a tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
    "a loop in itself": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a loop as a tree": "{% for n in [90] recursive %}{{ loop([n-1, n-1]) if n }}{% endfor %}",
    "calls in calls": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "a chain of filters": "{% set ns = namespace(g=range(99999)) %}{% for i in range(200) %}"
    "{% set ns.g = ns.g | map('string') %}{% endfor %}{{ ns.g | list | length }}",
    "sorting again and again": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "groups again and again": "{% for i in range(99999) %}{% set x = messages | groupby('role') %}"
    "{% endfor %}",
    "slices of nothing": "{{ [1] | slice(10**9) | list | length }}",
    "looking for a text": LONG + "{% for i in range(99999) %}{{ 'b' in long }}{% endfor %}",
    "comparing texts": LONG
    + "{% set l = 'a' * 500000 %}{% for i in range(99999) %}{{ l == long }}{% endfor %}",
    "copying a text": LONG + "{% for i in range(99999) %}{% set b = long[1:] %}{% endfor %}",
    "methods of a text": LONG + "{% for i in range(99999) %}{% set b = long.upper() %}{% endfor %}",
}
GROWTH = {
    "a text many times": "{{ 'a' * 10**9 }}",
    "many times a text": "{{ 10**9 * 'a' }}",
    "a list many times": "{{ ([0] * 10**9) | length }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a width from outside": "{{ '%*d' % (10**9, 1) }}",
    "many digits": "{{ '%.1000000000f' % 1 }}",
    "the filter for formats": "{{ '%1000000000d' | format(1) }}",
    "a test that formats": "{{ '%1000000000d' is odd }}",
    "another one": "{{ ['%1000000000d'] | select('divisibleby', 3) | list }}",
    "the method for formats": "{{ '{:1000000000}'.format(1) }}",
    "formats in formats": "{{ '{:{}}'.format(1, 10**9) }}",
    "a field many times": LONG + "{{ ('{0}' * 100000).format(long) }}",
    "a name many times": LONG + "{{ ('%(a)s' * 100000) % {'a': long} }}",
    "a map for formats": LONG + "{{ ('{a}' * 100000).format_map({'a': long}) }}",
    "powers": "{{ 10**(10**8) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "digits in front": "{{ 5 | round(-1000000000) }}",
    "digits behind": "{{ 5 | round(1000000000, 'ceil') }}",
    "a number of a million digits": "{{ ('f' * 1000000) | int(0, 16) + 1 }}",
    "a text twice": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a list twice": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a block twice": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "output": LONG + "{% for i in range(99999) %}{{ long }}{% endfor %}",
    "text of the template": "{% for i in range(99999) %}{% for i in range(9) %}"
    + "y" * 9999
    + "{% endfor %}{% endfor %}",
    "lists in lists": "{% set ns = namespace(s=[]) %}"
    "{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "itself in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "lists that are kept": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [[i]] %}{% endfor %}",
    "texts that are kept": "{% set x = range(99999) | map('string') | map('center', 90000) | list %}",
    "twice: printed": TWICE + "{{ ns.a }}",
    "twice: as JSON": TWICE + "{{ ns.a | tojson }}",
    "twice: compared": TWICE + "{{ ns.a == ns.b }}",
    "twice: looked for": TWICE + "{{ ns.a in [ns.b] }}",
    "twice: tested": TWICE + "{{ ns.a is eq(ns.b) }}",
    "twice: a key": TWICE + "{{ {ns.t: 1} }}",
    "twice: looked up": TWICE + "{{ {}[ns.t] }}",
    "twice: got": TWICE + "{{ {}.get(ns.t) }}",
    "twice: changed": TWICE
    + "{% for x in [1, 2] %}{{ loop.changed(ns.a if loop.first else ns.b) }}{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "methods that pad": "{{ 'a'.center(10**9) }}",
    "methods of markup": "{{ ('a' | safe).center(10**9) }}",
    "escaped text": "{{ ('a' | e).ljust(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent of JSON": "{{ [[1]] | tojson(indent=10**9) }}",
    "replace": LONG + "{{ long.replace('a', long) }}",
    "replacing nothing": LONG + "{{ long | replace('', long) }}",
    "join": LONG + "{{ range(99999) | join(long) }}",
    "the method that joins": LONG + "{{ long.join([''] * 99999) }}",
    "joining what comes": LONG + "{{ long.join(range(99999) | map('string')) }}",
    "a batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "a sum of lists": "{{ ([[1] * 999] * 999) | sum(start=[]) | length }}",
    "a date": "{{ strftime_now('%1000000000d') }}",
    "an error": "{{ raise_exception('a' * 10**9) }}",
}
REACHES = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "an item": "{{ ''['__class__'] }}",
    "attr": "{{ '' | attr('__class__') }}",
    "attr in a map": "{{ [''] | map('attr', '__class__') | list }}",
    "attributes of a map": "{{ [''] | map(attribute='__class__') | list }}",
    "attributes to sort by": "{{ ['', ''] | sort(attribute='__class__') }}",
    "attributes to group by": "{{ [''] | groupby('__class__') }}",
    "attributes in a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a format that is kept": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "a format through attr": "{{ ('{0.__class__}' | attr('format'))('') }}",
    "a map in a format": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "modules of a class": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "a loop": "{% for a in [1] %}{{ loop.__class__ }}{% endfor %}",
    "nothing": "{{ nothing.__class__ }}",
    "a name for a namespace": "{{ namespace(__class__=1) }}",
    "a name in a namespace": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "a name from a list": "{{ namespace([['__init__', 1]]) }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'x'}) }}",
    "pop": "{% set x = messages[0].pop('role') %}",
    "bytes of a number": "{{ (5).to_bytes(10**9, 'big') }}",
    "bytes of a text": "{{ 'a'.encode() }}",
    "a table of letters": "{{ 'a'.translate({97: 'b' * 10**6}) }}",
    "markup": "{{ ('{0.__class__}' | safe).format('') }}",
}


@contextmanager
def little_memory() -> Iterator[None]:
    """Inside, this process gets no more memory than a little, where the system tells how much it has."""
    status = Path("/proc/self/status")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if status.exists():
        told = status.read_text().splitlines()
        has = next(int(line.split()[1]) << 10 for line in told if line.startswith("VmSize:"))
        resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", [*LOOPS, *GROWTH, *REACHES])
def test_a_hostile_template_ends_with_5(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in ("loops in loops", "a text twice", "a list twice"):  # these show it in full
        monkeypatch.setattr(allowance, "BASE_UNITS", allowance.BASE_UNITS // 8)
    source = (LOOPS | GROWTH | REACHES)[name]
    with little_memory(), pytest.raises(SafetyError) as caught:
        ChatTemplate(source, where="models/own.jinja").render(MESSAGES)
    told = str(caught.value)
    assert "MemoryError" not in told
    assert caught.value.exit_code is ExitCode.SAFETY
    assert told.startswith("models/own.jinja") and ": the chat template was stopped: it " in told
    assert told.isprintable() and len(told) < 600


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
        "{{ " + "not " * 9999 + "1 }}",
        "{{ a" + ".b" * 9999 + " }}",
        "{{ a" + "|upper" * 9999 + " }}",
        "{{ 1" + "+1" * 9999 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" + "{% elif b %}" * 4000 + "{% endif %}",
    ],
    ids=lambda source: source[:20],
)
def test_a_template_that_is_nested_too_deeply_ends_with_5(source: str) -> None:
    with pytest.raises(SafetyError, match="the chat template is nested too deeply"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("a\n{% for %}", "own.jinja:2: the chat template cannot be read: "),
        ("{{ a", "own.jinja:1: the chat template cannot be read: unexpected end of template"),
        ("{{ a | nonsense }}", "own.jinja:1: the chat template cannot be read: No filter named 'nonsense'"),
        ("{{ a is nonsense }}", "cannot be read: No test named 'nonsense'"),
        ("{{ [1] | random }}", "No filter named 'random'"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "cannot be read: a chat template has no block"),
        ("{% include 'x' %}", "a chat template has no include"),
        ("{% import 'x' as y %}", "a chat template has no import"),
        ("{% extends 'x' %}", "a chat template has no extends"),
        ("{% autoescape true %}{% endautoescape %}", "a chat template has no scopedevalcontextmodifier"),
        ("{{ " + "9" * 5000 + " }}", "cannot be read: "),
        ("a" * (MOST_CHARACTERS + 1), f"the chat template has more than {MOST_CHARACTERS} characters"),
    ],
)
def test_what_is_no_template_is_one_line(source: str, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTemplate(source, where="own.jinja").render(MESSAGES)
    assert told in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "{{ raise_exception('Not\nso!') }}",
            "own.jinja:1: the chat template refuses the conversation: Not\\nso!",
        ),
        ("{{ raise_exception('a' * 5000) }}", "refuses the conversation: aaa"),
        (
            "a\n\n{{ nothing.b }}",
            "own.jinja:3: the chat template fails on the conversation: 'nothing' is undef",
        ),
        ("{{ 1 + 'a' }}", "fails on the conversation: unsupported operand type"),
        ("{{ 1 / 0 }}", "fails on the conversation: division by zero"),
        ("{{ messages | tojson(1, 2, 3, 4, 5, 6) }}", "fails on the conversation: "),
        ("{{ 'a'.center() }}", "fails on the conversation: "),
        ("{{ 'a' | replace }}", "fails on the conversation: "),
        ("{{ range() }}", "fails on the conversation: "),
        (
            "{{ nothing | tojson }}",
            "fails on the conversation: Object of type Undefined is not JSON serializable",
        ),
        ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
        ("{{ {}[[]] }}{{ {[]: 1} }}", "unhashable type"),
        ("{% set ns = 1 %}{% set ns.x = 1 %}", "cannot assign attribute on non-namespace object"),
    ],
)
def test_a_template_that_fails_on_a_conversation_is_one_line(source: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        ChatTemplate(source, where="own.jinja").render(MESSAGES)
    assert told in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_what_a_template_may_use_grows_with_the_conversation() -> None:
    """Templates that copy what they have for each message work on long conversations."""
    copies = (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m.content %}{% endfor %}"
    )
    pairs = "{% for a in messages %}{% for b in messages %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": f"{i} " + "words " * 40} for i in range(120)]
    text = ChatTemplate(copies + pairs + "{{ ns.s }}").render(messages)
    assert text == "".join(message["content"] for message in messages)
    with pytest.raises(SafetyError):
        ChatTemplate("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2).render(messages[:1])


def test_a_template_that_was_stopped_can_be_used_again() -> None:
    template = ChatTemplate("{% for i in range(messages[0].content | int) %}{{ 'x' * 1000 }}{% endfor %}")
    for _ in range(2):
        with pytest.raises(MlxloraError):
            template.render([{"role": "user", "content": "99999"}])
        assert template.render([{"role": "user", "content": "2"}]) == "x" * 2000
