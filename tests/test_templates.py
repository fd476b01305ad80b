"""Chat templates: equal to jinja2 as transformers configures it, and bounded whatever they do."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kbit._core import KbitError
from kbit.text import TemplateError
from kbit.text.template import ChatTemplate

NAMES = [
    "Qwen-Qwen2.5-7B-Instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
]


class Generation(Extension):
    """transformers' tag, without its bookkeeping."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_call"), [], [], body).set_lineno(line)

    def _call(self, caller):
        return caller()


def reference(source: str, **names) -> str:
    """What jinja2 makes of a template in the configuration of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render(**names)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Weather of <a> "place" & more, 天気',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "days": {"type": "integer", "default": 1.5},
                },
                "required": ["place"],
            },
            "return": {"type": "string"},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]
USER = {"role": "user", "content": "  Hi there,\n<|im_end|> </s> 你好 🦙 "}
SYSTEM = {"role": "system", "content": "Be brief. "}
ANSWER = {"role": "assistant", "content": "<think>\nhm</think>Yes."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Graz", "days": 2, "x": None}},
        }
    ],
}
TEXT_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "123456789", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        {"id": "987654321", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
}
RESULT = {"role": "tool", "content": "12 °C", "tool_call_id": "abcdefghi", "name": "weather"}
CONVERSATIONS: list[dict] = [
    {"messages": [USER]},
    {"messages": [SYSTEM, USER]},
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER, USER]},
    {"messages": [USER, ANSWER, USER, ANSWER, USER]},
    {"messages": [USER, USER]},
    {"messages": [SYSTEM]},
    {"messages": [ANSWER]},
    {"messages": [USER], "tools": TOOLS},
    {"messages": [SYSTEM, USER], "tools": TOOLS},
    {"messages": [USER, CALL], "tools": TOOLS},
    {"messages": [USER, CALL, RESULT], "tools": TOOLS},
    {"messages": [USER, CALL, RESULT, ANSWER, USER], "tools": TOOLS},
    {"messages": [USER, TEXT_CALL, RESULT, RESULT, ANSWER]},
    {"messages": [USER, TEXT_CALL]},
    {"messages": [USER], "documents": [{"title": "T", "text": "body"}]},
    {"messages": [USER], "builtin_tools": ["code_interpreter", "weather"], "tools": TOOLS},
    {"messages": [USER, CALL], "builtin_tools": ["weather"], "date_string": "1 Jan 2030"},
    {"messages": [SYSTEM, USER], "tools": TOOLS, "tools_in_user_message": False},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]},
    {"messages": [{"role": "observer", "content": "x"}]},
    {"messages": []},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def outcome(render, **names):
    """The text, or None for a template that refuses the conversation."""
    try:
        return render(**names)
    except (TemplateError, jinja2.exceptions.TemplateError, TypeError):
        return None


@pytest.mark.parametrize("name", NAMES)
def test_real_templates(name, shared):
    source = shared(f"chat-templates/{name}.jinja").read_bytes().decode()
    template = ChatTemplate(source)
    rendered = 0
    for conversation in CONVERSATIONS:
        for prompt in (False, True):
            names = {"tools": None, "documents": None, **TOKENS, **conversation}
            names["add_generation_prompt"] = prompt
            # transformers drops what is null; kbit keeps it for a template that fails without.
            dropped = [{k: v for k, v in m.items() if v is not None} for m in names["messages"]]
            expected = outcome(partial(reference, source), **{**names, "messages": dropped})
            if expected is None:
                expected = outcome(partial(reference, source), **names)
            messages = names.pop("messages")
            assert outcome(lambda m=messages, **kw: template.render(m, **kw), **names) == expected
            rendered += expected is not None
    assert rendered >= 10, f"only {rendered} conversations were not refused"


DATA = {
    "n": 5, "s": "Hello <b>World</b> & co", "l": [3, 1, 2], "e": [], "d": {"b": 1, "a": [1, {"x": None}]}, "f": 2.5,
    "t": (1, "two"), "m": [{"r": "u", "c": "one", "k": 1}, {"r": "a", "c": "Two"}, {"r": "u", "c": "three", "k": 0}],
    "u": "Straße İ 日本 \U0001f999", "w": "  a  b \n c\t", "none": None,
}  # fmt: skip
EXPRESSIONS = [
    "n + 1",
    "n - 7",
    "n * f",
    "n / 2",
    "n // 2",
    "n % 3",
    "-n",
    "+n",
    "2 ** 10",
    "2 ** -1",
    "s * 2",
    "l * 2",
    "l + l",
    "t + t",
    "s ~ n ~ none ~ l",
    "n < 6 < 7",
    "n == 5.0",
    "'a' < 'b'",
    "l == [3, 1, 2]",
    "d == d",
    "'b' in d",
    "1 in l",
    "'lo' in s",
    "4 not in l",
    "not n",
    "n and 0",
    "e or 'x'",
    "'y' if n > 3 else 'z'",
    "'y' if n < 3",
    "s[0]",
    "s[-1]",
    "s[1:4]",
    "s[::-1]",
    "l[1:]",
    "t[::2]",
    "l[9]",
    "d['a'][1].x",
    "d.a[1]['x']",
    "d.missing",
    "missing",
    "missing is defined",
    "d.missing is undefined",
    "none is none",
    "[1, [2, 'a\\n\u2028', none, true, 1.0], {'k': (1,)}]",
    "{'a': 1, 2: 'b'}",
    "(1,)",
    "()",
    "true",
    "None",
    "1e100",
    "0.1 + 0.2",
    "1_000",
    "0x1f",
    "d.items() | list",
    "d.keys() | list",
    "d.values() | list",
    "d.get('b')",
    "d.get('zz', 4)",
    "d.items()",
    "s.upper()",
    "s.lower().title()",
    "s.split()",
    "s.split('o')",
    "s.split('o', 1)",
    "s.rsplit(' ', 1)",
    "w.splitlines()",
    "w.strip()",
    "s.replace('l', 'LL')",
    "s.replace('l', 'L', 1)",
    "s.startswith('He')",
    "s.endswith(('x', 'co'))",
    "s.find('W')",
    "s.count('o')",
    "s.index('W')",
    "','.join(['a', 'b'])",
    "s.partition(' ')",
    "'7'.zfill(3)",
    "'a'.center(5, '*')",
    "'ab'.ljust(4) ~ '|'",
    "'{}-{x:>4}-{0[0]}'.format('ab', x=3)",
    "'%s|%5.2f|%-4d|%%' % ('a', 2.5, 3)",
    "'%(a)s' % {'a': 1}",
    "'%s' % n",
    "s | length",
    "l | count",
    "l | sum",
    "m | sum(attribute='k', start=1)",
    "l | min",
    "l | max",
    "l | sort",
    "l | sort(reverse=true)",
    "m | sort(attribute='c') | map(attribute='c') | list",
    "['b', 'A', 'c'] | sort",
    "['b', 'A', 'c'] | sort(case_sensitive=true)",
    "m | map(attribute='k', default=9) | list",
    "m | selectattr('k') | list",
    "m | selectattr('r', 'equalto', 'u') | map(attribute='c') | join(', ')",
    "m | rejectattr('r', 'eq', 'u') | list",
    "l | select('odd') | list",
    "l | reject('>', 1) | list",
    "l | select | list",
    "l | map('string') | join('-')",
    "l | join",
    "m | join('+', attribute='c')",
    "l | first",
    "l | last",
    "e | first",
    "e | last",
    "e | min",
    "s | first",
    "l | reverse | list",
    "s | reverse",
    "d | items | list",
    "d | dictsort",
    "d | list",
    "s | list",
    "none | default('x')",
    "missing | default('x')",
    "'' | default('x', true)",
    "missing | d",
    "s | upper",
    "u | lower",
    "u | upper",
    "w | trim",
    "w | trim(' a')",
    "u | capitalize",
    "'it\\'s a-b_c d' | title",
    "s | replace('o', '0')",
    "s | e",
    "s | escape",
    "s | safe",
    "s | striptags",
    "s | truncate(10)",
    "s | truncate(10, true, '')",
    "w | indent",
    "'a\\nb\\n\\nc' | indent(2, true)",
    "'a\\nb' | indent('> ')",
    "s | wordcount",
    "'aaa bbb ccc ddd' | wordwrap(7)",
    "s | center(40)",
    "u | urlencode",
    "{'a b': 1, 'c': 'd&'} | urlencode",
    "'42' | int",
    "'x' | int(7)",
    "'ff' | int(0, 16)",
    "'1.5' | float",
    "f | int",
    "f | round",
    "2.567 | round(2)",
    "2.5 | round(0, 'floor')",
    "-3 | abs",
    "n | string",
    "123456789 | filesizeformat",
    "l | batch(2) | list",
    "l | batch(2, 0) | list",
    "l | slice(2) | list",
    "[1, 2, 1, 'a', 'A'] | unique | list",
    "m | groupby('r') | list",
    "m | map(attribute='r') | unique | join",
    "d | tojson",
    "u | tojson",
    "u | tojson(ensure_ascii=true)",
    "d | tojson(indent=2)",
    "d | tojson(separators=(',', ':'), sort_keys=true)",
    "s | attr('upper')()",
    "'%s-%s' | format('a', 1)",
    "n is odd",
    "n is even",
    "n is divisibleby 5",
    "n is number",
    "f is float",
    "n is integer",
    "true is boolean",
    "true is integer",
    "s is string",
    "d is mapping",
    "l is sequence",
    "d is sequence",
    "l is iterable",
    "n is iterable",
    "s is iterable",
    "none is iterable",
    "n is eq 5",
    "n is in l",
    "3 is in l",
    "s is lower",
    "'A' is upper",
    "true is true",
    "1 is true",
    "none is sameas none",
    "range(3) | list",
    "range(2, 8, 3) | list",
    "range(5)[-1]",
    "5 in range(9)",
    "namespace(a=1).a",
    "dict(a=1, b=2)",
    "dict([('a', 1)])",
    "missing + 1",
    "missing.x",
    "none.x",
    "none + 1",
    "'a' + 1",
    "l['x']",
    "raise_exception('no')",
    "strftime_now('%Y')",
    "1 / 0",
    "l.index(2)",
    "l.count(1)",
    "'ß'.upper()",
    "s.nothing",
    "l.nothing",
    "[none, missing]",
    "missing | list",
    "missing | join(',')",
    "missing | length",
    "missing | upper",
    "none | upper",
    "none | trim",
    "'a,b,,c'.split(',')",
    "'abc'[5]",
    "'abc'[1:][:1]",
    "{1: 2}[1]",
    "d['b', 'c']",
    "(l | sort)[0]",
    "10 | string | length",
    "'x' ~ (1 if false)",
    "l | map('upper') | list",
    "1 if l else 2",
    "m | selectattr('k') and true",
    "s is callable",
    "[] is false",
    "'<a>' | tojson",
    "1.0 | tojson",
    "true | tojson",
    "none | tojson",
    "[1, (2, 3)] | tojson",
    "missing | tojson",
    "1 + true",
    "'\u0000\u001b\u007f' | tojson",
    "['\u0000\u001b'] ",
    "not missing",
    "missing == missing",
    "missing == none",
    "[1,2] < [1,3]",
    "s.isalpha()",
    "s.casefold()",
    "'a\\tb'.expandtabs(4)",
    "'Ab'.swapcase()",
    "'aXbX'.removesuffix('X')",
    "'x' in 'y'",
    "l | sum / 2",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions(expression):
    source = "{{ " + expression + " }}"
    try:
        expected = reference(source, **DATA)
    except Exception:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render([], **DATA)
    else:
        assert ChatTemplate(source).render([], **DATA) == expected


STATEMENTS = [
    "{% for i in l %}[{{x}}]{% set x=i %}{% endfor %}",
    "{% set x=0 %}{% for i in l %}{% if i==2 %}{% set x=i %}{% endif %}[{{x}}]{% endfor %}{{x}}",
    "{% for i in l %}{{loop.index}}{{loop.index0}}{{loop.revindex}}{{loop.revindex0}}{{loop.first}}{{loop.last}}"
    "{{loop.length}}{{loop.previtem}}{{loop.nextitem}}{{loop.cycle('a','b')}}{{loop.depth}}{% endfor %}",
    "{% for i in l if i != 1 %}{{loop.index}}/{{loop.length}}:{{i}} {% else %}none{% endfor %}",
    "{% for i in e %}x{% else %}empty{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}"
    "{% break %}{% endif %}{{i}}{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{a}}{{b}}{% endfor %}",
    "{% for k, v in d.items() %}{{k}}={{v}};{% endfor %}",
    "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}({{ loop(i) }})"
    "{% else %}{{i}}@{{loop.depth}}{% endif %}{% endfor %}",
    "{% for i in l %}{{ loop.changed(i > 2) }}{% endfor %}",
    "{% macro f(a, b=2, c=a) %}{{a}}{{b}}{{c}}{{varargs}}{{kwargs}}{% endmacro %}{{f(1)}}{{f(1,2,3,4,z=5)}}",
    "{% macro f(a) %}[{{a}}{{z}}]{% endmacro %}{% set z = 3 %}{{f()}}{{f(a=1)}}",
    "{% macro f(a) %}[{{a}}]{% endmacro %}{{f(1, 2)}}",
    "{% macro f(a) %}[{{a}}]{% endmacro %}{{f(b=2)}}",
    "{% macro f(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) f(7) %}in{{y}}{% endcall %}",
    "{% macro f() %}x{% endmacro %}{% call f() %}y{% endcall %}",
    "{% macro fac(i) %}{{ i }}{% if i %},{{ fac(i - 1) }}{% endif %}{% endmacro %}{{ fac(5) }}",
    "{% set ns = namespace(a=1, b='x') %}{% for i in l %}{% set ns.a = ns.a + i %}{% endfor %}{{ns.a}}{{ns.b}}{{ns.c}}",
    "{% set a, b = 1, [2] %}{{a}}{{b}}",
    "{% set x %}a{{n}}{% endset %}{{x|upper}}",
    "{% set x | upper | replace('A', 'b') %}a{{n}}{% endset %}{{x}}",
    "{% filter upper | trim %} a{{s}} {% endfilter %}",
    "{% with a=1, b=n %}{{a}}{{b}}{% set c=3 %}{% endwith %}{{c}}{{a}}",
    "{% if n > 9 %}a{% elif n > 4 %}b{% else %}c{% endif %}",
    "{% if e %}a{% elif none %}b{% else %}c{% endif %}",
    "  {% if true %}\n  x\n  {% endif %}\n  y\n",
    "a {#- c -#} b {%- if true -%} c {%- endif +%} d\n",
    "{% raw %}{{ x }}{% endraw %}",
    "{% generation %}{{ n }}{% set q = 1 %}{% endgeneration %}{{ q }}",
    "{% if m | selectattr('zz') %}yes{% endif %}",
    "{% for i in missing %}x{% endfor %}",
    "{% for i in none %}x{% endfor %}",
    "{% set l = l[1:] %}{{ l }}",
    "{{ m[0].r }}{{ m[-1]['c'] }}{{ m[n] }}",
    "{% set o = namespace(t='') %}{% for x in m %}{% set o.t = o.t ~ x.c %}{% endfor %}{{ o.t }}",
    "{{ l.append(4) }}",
    "{{ d.update({'a': 2}) }}",
    "{{ nofunction() }}",
    "{% include 'x' %}",
    "{{ 'x' | nofilter }}",
    "{{ n is notest }}",
    "{% if %}",
    "{{ a b }}",
    "{% endfor %}",
]


@pytest.mark.parametrize("source", STATEMENTS)
def test_statements(source):
    try:
        expected = reference(source, **DATA)
    except Exception:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render([], **DATA)
    else:
        assert ChatTemplate(source).render([], **DATA) == expected


STRICTER = [
    "{{ s | attr('__class__') | string }}x",
    "{{ n.real }}",
    "{{ ''.__class__ }}",
    "{{ s['__class__'] }}",
    "{{ '{0.__class__}'.format(s) }}",
    "{{ l.append is defined }}",
    "{{ d.items() | map('random') }}",
    "{{ namespace() }}",
    "{{ l | map('upper') }}",
    "{{ lipsum() }}",
    "{{ cycler(1, 2) }}",
    "{{ '{!r}'.format(1) }}",
]


@pytest.mark.parametrize("source", STRICTER)
def test_refused_where_jinja2_prints_something(source):
    """Attributes of Python's types, objects without a text, what no template uses: an error, no surprise."""
    reference(source, **DATA)
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([], **DATA)


PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    PLAIN_VALUES,
    PLAIN_VALUES,
    st.sampled_from(["+", "-", "*", "/", "%", "//", "==", "!=", "<", ">=", "~", "and", "or", "in"]),
)
@settings(max_examples=300, deadline=None)
def test_operators_are_jinja2s(a, b, op):
    source = "{{ a " + op + " b }}|{{ [a, b] | tojson }}|{{ a }}"
    try:
        expected = reference(source, a=a, b=b)
    except Exception:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render([], a=a, b=b)
    else:
        assert ChatTemplate(source).render([], a=a, b=b) == expected


def doubling(start: str, step: str, times: int = 60) -> str:
    return (
        "{% set x = " + start + " %}" + ("{% set x = " + step + " %}") * times + "{{ x | length }}"
    )


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{{ range(10000000000) | list }}",
    "string doubling": doubling("'aaaa'", "x + x"),
    "concatenation": doubling("'aaaa'", "x ~ x"),
    "wide doubling": doubling("'\U0001f999'", "x + x"),
    "list doubling": doubling("[1]", "x + x"),
    "shared lists": "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "shared lists as JSON": "{% set x = ['a'] %}"
    + "{% set x = [x, x] %}" * 60
    + "{{ x | tojson }}",
    "shared dicts": "{% set x = 1 %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x == x }}",
    "shared tuple as key": "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 60 + "{{ {x: 1} }}",
    "times": "{{ ('a' * 1000000) * 1000 }}",
    "times list": "{{ [1] * 100000000 }}",
    "power": "{{ 9 ** 999999999 }}",
    "negative power": "{{ 9 ** -999999999 }}",
    "powers": doubling("3", "x * x"),
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' % (1000000000, 1) }}",
    "format many": "{{ ('%(a)s' * 100000) % {'a': 'b' * 1000000} }}",
    "str.format width": "{{ '{:>1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "str.format escape": "{{ '{0.__class__.__mro__}'.format('') }}",
    "str.format by map": "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "str.center": "{{ 'a'.center(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
    "join": "{{ ('b' * 100000).join('a' * 100000) }}",
    "join filter": "{{ range(99999) | join('b' * 100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000, blank=true) }}",
    "json indent": "{{ [[[[1]]]] | tojson(indent=1000000000) }}",
    "json separators": "{{ range(9999) | list | tojson(separators=('b' * 1000000, 'c')) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "wordwrap": "{{ ('a' * 1000000) | wordwrap(1) }}",
    "striptags": "{{ ('<!---->' * 100000) | striptags }}",
    "strip set": "{{ ('b' * 1000000).strip('a' * 1000000 + 'b') }}",
    "urlencode": "{{ ('é' * 4000000) | urlencode }}",
    "letters": "{{ ('a' * 8000000) | list | length }}",
    "lines": "{{ ('\n' * 8000000).splitlines() | length }}",
    "parts": "{{ ('ab' * 4000000).split('a') | length }}",
    "title": "{{ ('a ' * 4000000) | title }}",
    "words": "{{ ('a ' * 4000000) | wordcount }}",
    "sort": "{{ (range(99999) | list) * 20 | sort | length }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "mutual recursion": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{{ f() }}"
    "{% endmacro %}{{ g() }}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "call recursion": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{{ caller() }}{% endmacro %}"
    "{% call f() %}x{% endcall %}",
    "deep ifs": "{% if true %}" * 5500 + "x" + "{% endif %}" * 5500,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep nots": "{{ " + "not " * 5000 + "1 }}",
    "deep minus": "{{ " + "- " * 5000 + "1 }}",
    "deep sums": "{{ 1" + " + 1" * 5000 + " }}",
    "deep filters": "{{ 'a'" + " | trim" * 5000 + " }}",
    "deep attributes": "{{ a" + ".a" * 5000 + " }}",
    "deep conditions": "{{ " + "1 if 0 else " * 5000 + "1 }}",
    "deep set blocks": "{% set x %}" * 5000 + "{% endset %}" * 5000,
    "deep values": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "long number": "{{ " + "9" * 1000000 + " }}",
    "long source": "{{ 1 }}" * 149796,
    "too long source": "x" * ((1 << 20) + 1),
    "lines of source": "\n" * (1 << 20) + "{{",
    "escapes": "{{ '" + "\\\\" * 500000 + "' }}",
    "hex": "{{ 0x" + "a" * 1000000 + " }}",
    "unclosed string": "{{ '" + "a" * 1000000,
    "unclosed comment": "{#" + "a" * 1000000,
    "many texts": "{% for i in range(99999) %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
    "held texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set t = 'a' * 1000000 + i|string %}"
    "{% set ns.l = ns.l + [t] %}{% endfor %}",
    "held loops": "{% for i in range(99999) if true %}{{ loop.length }}"
    "{% for j in range(99999) if loop.length %}{% endfor %}{% endfor %}",
    "capture": "{% set x %}a{% endset %}"
    + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60
    + "{{ x | length }}",
    "macro text": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% else %}aaaaaaaaaaaaaaaa{% endif %}"
    "{% endmacro %}{{ f(25) }}",
    "keys": "{% set ns = namespace(d={}) %}{% for i in range(99999) %}"
    "{% set ns.d = dict(ns.d, **{'k' ~ i: i}) %}{% endfor %}",
    "escape": "{{ ('&' * 8000000) | e }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "attr": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "undefined": "{{ missing.x.y }}",
    "raise": "{{ raise_exception('x' * 1000000) }}",
    "strftime": "{{ strftime_now('%c' * 1000000) }}",
}

CHILD = """
import json, resource, sys, time
from kbit.text.template import ChatTemplate
from kbit._core import KbitError
ChatTemplate("{% for m in messages %}{{ m | tojson | upper | trim }}{% endfor %}").render([{"role": "a"}])
sources = json.load(sys.stdin)
with open("/proc/self/statm") as f:
    base = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (base + (64 << 20), base + (64 << 20)))
for name, source in sources.items():
    start = time.process_time()
    try:
        out = "text %d" % len(ChatTemplate(source).render([]))
    except KbitError as error:
        out = "error " + str(error)[:200].encode("ascii", "replace").decode()
    print(json.dumps([name, out, time.process_time() - start]), flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the process size from /proc"
)
def test_hostile_templates(record_line):
    """Each ends in a typed error within a second of the processor; 64 MiB are all the child may map."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert [name for name, _, _ in results] == list(HOSTILE)
    assert [(name, out) for name, out, _ in results if not out.startswith("error")] == []
    assert [(name, out) for name, out, _ in results if "out of memory" in out] == []
    slowest = max(results, key=lambda result: result[2])
    record_line(
        f"hostile chat templates: {len(results)}, the slowest takes {slowest[2]:.2f} s ({slowest[0]})"
    )
    assert slowest[2] < 1.0, slowest


def test_bounds_leave_room_for_real_work():
    """What is refused must not be what people send: long conversations with texts gathered in a namespace."""
    source = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ (m.content | trim) ~ '\n' %}"
        "{% endfor %}{{ ns.t }}"
    )
    messages = [{"role": "user", "content": "word " * 200}] * 1000
    text = ChatTemplate(source).render(messages)
    assert len(text) == 1000 * 1000


def test_error_is_typed_and_says_where():
    with pytest.raises(KbitError, match="line 2"):
        ChatTemplate("a\n{{ 1 + 'a' }}").render([])
    with pytest.raises(TypeError, match="set"):
        ChatTemplate("").render([{"role": "user", "content": {1}}])
