"""Chat templates: what they write, and what they may not do."""

from __future__ import annotations

import resource

import pytest
from template_cases import USER, no_process_left, render

from jaxdecode import chat_template
from jaxdecode.errors import ChatTemplateError, DecodeError, RequestError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "<b>2 & 2?</b>"},
]

CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}"""

INST = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = '' %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {% set text = (system if loop.first else '') + message.content.strip() %}
        {{- bos_token + '[INST] ' + text + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- set ns = namespace(system='', count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content %}{% continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {%- if loop.index == 2 and ns.system %}{{ '(' ~ ns.system ~ ') ' }}{% endif %}
    {{- message['content'] | trim }}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{{- ns.count if date_string | int < 2000 }}"""

MISTRAL = """\
{%- macro check(expected, found) %}
    {%- if expected != found %}
        {{- raise_exception(expected ~ ' expected, but this is from ' ~ found) }}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {{- check(['user', 'assistant'][loop.index0 % 2], message.role) }}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- else %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{#- a comment -#}
{{ {'last': messages[-1].content} | tojson }}"""


def test_chatml():
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, TALK, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Hello! <|im_end|>\n<|im_start|>user\n<b>2 & 2?</b><|im_end|>\n"
    )


def test_llama2_instructions():
    assert render(INST, TALK) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s>"
        "<s>[INST] <b>2 & 2?</b> [/INST]"
    )


def test_llama3_headers():
    assert render(LLAMA3, TALK) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\n(Be brief.) Hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<b>2 & 2?</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral_with_generation_block_and_tojson():
    assert render(MISTRAL, TALK) == (
        '<s>[INST]Hi[/INST] Hello! </s>[INST]<b>2 & 2?</b>[/INST]{"last": "<b>2 & 2?</b>"}'
    )


@pytest.mark.parametrize("template", [INST, MISTRAL])
def test_text_of_raise_exception_reaches_the_user(template):
    expected = "must alternate user/assistant" if template is INST else "user expected, but this is"
    with pytest.raises(ChatTemplateError, match=f"refuses these messages: .*{expected}") as caught:
        render(template, [{"role": "assistant", "content": "first"}])
    assert "\n" not in str(caught.value)


def test_every_unicode_character_survives_the_pipes():
    text = "".join(map(chr, [*range(0x300), 0x2028, 0x4E2D, 0xFFFD, 0xFFFF, 0x1F600, 0x10FFFF]))
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_special_tokens_that_a_model_lacks_are_undefined():
    assert render("{{ bos_token }}|{{ eos_token is defined }}", bos_token=None, eos_token=None) == (
        "|False"
    )


def test_long_conversations_are_not_taken_for_an_attack():
    text = "word " * 1_200_000
    out = render(
        "{{ messages[0].content }}{{ messages[0].content }}", [{"role": "user", "content": text}]
    )
    assert out == text + text


FORBIDDEN = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}' | format_map }}{{ ''.format_map.__self__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(content='x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ (messages | list).clear() }}",
]
GREEDY = {
    "{{ 'a' * 10**9 }}": "256 MB",
    "{{ [1] * 10**9 }}": "256 MB",
    "{{ '%1000000000d' | format(1) }}": "256 MB",
    "{{ 'a' | center(10**9) }}": "256 MB",
    "{{ 'a\n' | indent(10**9) }}": "256 MB",
    "{{ messages | tojson(indent=10**9) }}": "256 MB",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}": "256 MB",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}": "more than 2 s",
    "{{ 7 ** (7 ** 9) }}": "more than 2 s",
    "{{ lipsum(n=10**6) }}": "more than 2 s",
    "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}": "more than 4194316 bytes of text",
    "{{ 'x' * (5 * 10**6) }}": "more than 4194316 bytes of text",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recurses without end",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}": "recurses without end",
    "{{ range(10**7) }}": "Range too big",
}


@pytest.mark.parametrize("template", FORBIDDEN)
def test_attacks_on_the_sandbox_fail(template):
    with (
        no_process_left(),
        pytest.raises(ChatTemplateError, match=r"forbidden|not valid Jinja.*No filter"),
    ):
        render(template)


def test_messages_are_the_same_after_an_attack():
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ChatTemplateError, match="'update' of a dict is out of bounds"):
        render("{{ messages[0].update(content='x') }}", messages)
    assert messages == USER


@pytest.mark.parametrize("template", GREEDY)
def test_greedy_templates_are_stopped(template):
    # CPU time, for wall time depends on what else the machine does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (
        no_process_left(),
        pytest.raises(ChatTemplateError, match=GREEDY[template]) as caught,
    ):
        render(template)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.5
    assert "--no-chat" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("one\ntwo {% if %}", r"not valid Jinja \(line 2\)"),
        ("{% for x in messages %}", r"not valid Jinja \(line 1\).*end of template"),
        ("{{ nothing.at.all }}", r"failed \(line 1\): UndefinedError"),
        ("\n\n{{ 1 / 0 }}", r"failed \(line 3\): ZeroDivisionError"),
        ("{% include 'secret' %}", r"failed \(line 1\): TypeError: no loader"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "failed.*SyntaxError"),
        (r"{{ '\ud800' }}", "half of a surrogate pair"),
        ("{{ raise_exception('a\x1b[31mb\nc') }}", r"messages: a \[31mb c$"),
        ("{{ 1 }}" * 40_000, "280000 bytes; at most 262144"),
        (None, "no chat template.*--no-chat"),
    ],
)
def test_failing_templates_are_explained(template, match):
    with pytest.raises(ChatTemplateError, match=match):
        render(template)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hi", "must be a list of .* found str"),
        (None, "found NoneType"),
        ([], "0 entries; 1 to 10000"),
        (USER * 10_001, "10001 entries"),
        (["Hi"], r"messages\[0\] must be a dict .* found str"),
        ([*USER, {"role": "user"}], r"messages\[1\] must be a dict .* found \['role'\]"),
        ([{"role": "user", "content": "x", "name": "y"}], "found .*'name'"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\['role'\] must be a str, found int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "found list; only text"),
        ([{"role": "user", "content": None}], "found NoneType; only text"),
        ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
        ([{"role": "user", "content": "x" * (33 << 20)}], "bytes of text; at most 33554432"),
    ],
)
def test_malformed_messages_are_refused_before_a_process_starts(messages, match, monkeypatch):
    monkeypatch.setattr(chat_template, "_run_child", None)
    with pytest.raises(RequestError, match=match):
        render(CHATML, messages)


def test_errors_are_of_the_one_family():
    assert issubclass(ChatTemplateError, DecodeError)


def test_a_rendering_costs_little_processor_time():
    render(CHATML)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    render(CHATML)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
