"""Chat templates as they come with models, rendered by us and by transformers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from jaxwna16.errors import InputError
from jaxwna16.generation import chat_template
from jaxwna16.generation.text import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- message.tool_calls[0].function.arguments | tojson(indent=2) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
# Loop controls, a namespace, tojson without HTML escapes, the block that marks words to train on.
MODERN = """{% set ns = namespace(turns=0) %}{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.turns = ns.turns + 1 %}
<|im_start|>{{ message.role }}
    {% if message.role == 'assistant' %}
        {% generation %}{% set own = 1 %}{{ message.content }}{% endgeneration %}
    {% else %}{{ message | tojson }}{% endif %}<|im_end|>{{ own is defined }}
{% endfor %}{{ ns.turns }} {{ dict(a=1)['a'] }} {{ sep_token is defined }} {{ image_token }}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "modern": MODERN}

USER = {"role": "user", "content": " What is <2> & 3? 你好 👋 \n"}
ANSWER = {"role": "assistant", "content": "It's 5.\n\nBye <|im_end|>"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "é": "<b>"}}}],
}

CONVERSATIONS = [[USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER], [USER, CALL]]

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint's folder; its tokenizer knows single bytes and begins every text with <s>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def read_with(folder: Path, **config) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def render_with_transformers(folder: Path, messages, prompt: bool = True, **options) -> str:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    options |= {"add_generation_prompt": prompt, "tokenize": False}
    return reference.apply_chat_template(messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_rendered_chat_is_that_of_transformers(folder, name, messages, prompt):
    tokenizer = read_with(
        folder,
        bos_token={"__type": "AddedToken", "content": "<|begin_of_text|>"},
        eos_token="</s>",
        image_token="[INST]",
        chat_template=TEMPLATES[name],
    )
    try:
        expected = render_with_transformers(folder, messages, prompt)
    except Exception as refusal:
        with pytest.raises(InputError, match="refused the messages") as caught:
            tokenizer.render_chat(messages, prompt)
        assert str(refusal) in str(caught.value)
    else:
        assert tokenizer.render_chat(messages, prompt) == expected
        ids = tokenizer.encode_chat(messages, prompt)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
BLOCKS = "{% for m in messages %}{% for b in m.content %}{{ b.text }}|{% endfor %}</s>{% endfor %}"
CUT = "{% for m in messages %}{{ m.content.split('|')[0] }}</s>{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, TRIMMED, BLOCKS, CUT], ids=range(4))
@pytest.mark.parametrize(
    "content", ["It is ", "s", "", " \n", "a|b", None, [{"text": "no"}, {"text": "yes "}, {"n": 1}]]
)
def test_an_open_message_ends_as_in_transformers(folder, template, content):
    tokenizer = read_with(folder, chat_template=template)
    messages = [{"role": "user", "content": "s"}, {"role": "assistant", "content": content}]
    options = {"continue_final_message": True}
    try:
        expected = render_with_transformers(folder, messages, False, **options)
    except Exception:
        with pytest.raises(InputError, match=r"last message|refused the messages"):
            tokenizer.render_chat(messages, False, **options)
    else:
        assert tokenizer.render_chat(messages, False, **options) == expected


def test_an_open_message_and_a_beginning_answer_exclude_each_other(folder):
    with pytest.raises(InputError, match="pass add_generation_prompt=False"):
        read_with(folder, chat_template="x").render_chat([USER], continue_final_message=True)


@pytest.mark.parametrize(
    "reasoning",
    [
        {"reasoning": "r"},
        {"thinking": "t"},
        {"reasoning_content": "c", "thinking": "t"},
        {"reasoning": "r", "thinking": None},
    ],
)
def test_reasoning_has_the_names_that_transformers_gives_it(folder, reasoning):
    tokenizer = read_with(folder, chat_template="{{ messages | tojson }}")
    messages = [USER, {"role": "assistant", **reasoning, "content": "5"}]
    assert tokenizer.render_chat(messages) == render_with_transformers(folder, messages)


def test_a_template_that_refuses_a_role_says_which_roles_there_were(folder):
    tokenizer = read_with(folder, chat_template=MISTRAL)
    with pytest.raises(InputError, match=r"\(roles: user, pirate\): Only user and assistant"):
        tokenizer.render_chat([USER, {"role": "pirate", "content": "Arr."}])


def test_a_chat_begins_with_one_bos(folder):
    tokenizer = read_with(folder, bos_token="<s>", chat_template=MISTRAL)
    assert tokenizer.encode_chat([USER]).count(0) == 1
    assert tokenizer.encode("x")[0] == 0


def test_the_jinja_file_goes_before_the_config(folder):
    (folder / "chat_template.jinja").write_text("new é", encoding="utf-8")
    tokenizer = read_with(folder, chat_template="old")
    assert tokenizer.render_chat([USER]) == "new é" == render_with_transformers(folder, [USER])


def test_of_several_templates_the_default_is_taken(folder):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    tokenizer = read_with(folder, chat_template=named)
    assert tokenizer.render_chat([USER]) == "d" == render_with_transformers(folder, [USER])


@pytest.mark.parametrize(("added", "bos"), [({}, "<s>"), ({"added_tokens_decoder": {}}, "</s>")])
def test_the_special_tokens_map_counts_only_without_added_tokens(folder, added, bos):
    special_tokens_map = {"bos_token": {"content": "<s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    tokenizer = read_with(folder, bos_token="</s>", chat_template="{{ bos_token }}", **added)
    assert tokenizer.render_chat([USER]) == bos == render_with_transformers(folder, [USER])


@pytest.mark.parametrize(
    "config", [{}, {"chat_template": None}, {"chat_template": [{"name": "rag", "template": "r"}]}]
)
def test_without_a_template_the_way_out_is_named(folder, config):
    tokenizer = read_with(folder, **config)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match=r"no chat template.*plain prompt"):
        tokenizer.render_chat([USER])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].clear() }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ namespace({'__html__': 1}) }}",
        "{% include 'tokenizer.json' %}",
        "{{ undefined.field }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_that_misbehaves_is_refused(folder, template):
    tokenizer = read_with(folder, chat_template=template)
    with pytest.raises(InputError, match=r"refused the messages \(roles: user\)"):
        tokenizer.render_chat([USER])


@pytest.mark.parametrize(
    "template", ["{% if %}", "{% generation %}", "{{ a", "{{" + "(" * 5000 + "}}"], ids=range(4)
)
def test_a_broken_template_is_refused_when_it_is_used(folder, template):
    tokenizer = read_with(folder, chat_template=template)
    with pytest.raises(InputError, match="template is broken"):
        tokenizer.render_chat([USER])


@pytest.mark.parametrize(
    "messages",
    [[], ["hello"], [{"content": "x"}], [{"role": 3}], [{"role": "user", "content": {1j}}], 5],
)
def test_messages_of_another_form_are_refused(folder, messages):
    tokenizer = read_with(folder, chat_template="x")
    with pytest.raises(InputError, match="message"):
        tokenizer.render_chat(messages)


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
LIMITS = {
    "loops in loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        r"more than 0\.3 s",
    ),
    "a slice into 10^9": ("{{ [1, 2] | slice(10 ** 9) | list | length }}", r"more than 0\.3 s"),
    "lipsum": ("{{ lipsum(n=10 ** 7) }}", r"more than 0\.3 s"),
    "200,000 statements": ("{% set a = 1 %}" * 200_000, r"more than 0\.3 s"),
    "a wide number": ("{{ '%900000000d' % 1 }}", r"more than (0\.3 s|512 MB)"),
    "a wide format": ("{{ '{:900000000d}'.format(1) }}", r"more than (0\.3 s|512 MB)"),
    "text that doubles": (DOUBLING + "{% endfor %}", r"more than (0\.3 s|512 MB)"),
    "a long list": ("{{ [0] * 10 ** 10 }}", r"more than (0\.3 s|512 MB)"),
    "a long text": ("{{ 'a' * 17_000_000 }}", "writes 17,000,000 characters, more than 8,000"),
    "a long reason": ("{{ raise_exception('ab' * 10 ** 6) }}", "refused.*(ab){1000}$"),
    "a circle": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
}


@pytest.mark.skipif(os.name != "posix", reason="limits are the system's")
@pytest.mark.parametrize("name", LIMITS)
def test_a_template_without_end_is_ended_with_a_reason(folder, monkeypatch, name):
    template, reason = LIMITS[name]
    if r"0\.3 s" in reason:  # the others end by themselves
        monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    tokenizer = read_with(folder, chat_template=template)
    with pytest.raises(InputError, match=reason) as caught:
        tokenizer.render_chat([USER])
    assert str(folder) in str(caught.value) and "chat template" in str(caught.value)
    assert read_with(folder, chat_template="next").render_chat([USER]) == "next"


def test_variables_that_are_no_json_are_refused(folder):
    tokenizer = read_with(folder, chat_template="{{ more }}")
    assert tokenizer.render_chat([USER], variables={"more": {"a": None}}) == "{'a': None}"
    with pytest.raises(InputError, match="variables must be plain JSON values"):
        tokenizer.render_chat([USER], variables={"more": {1j}})


def test_a_missing_jinja2_says_how_to_install_it(folder, monkeypatch):
    tokenizer = read_with(folder, chat_template="x")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r'jinja2.*pip install "jaxwna16\[text\]"'):
        tokenizer.render_chat([USER])
