"""Prompts that transformers makes of conversations, for templates in the style of published models.

    python scripts/golden/chat_templates.py [--out DIR]

Writes `chat/NAME.json`: `{name, template, bos, eos, cases}`, a case being `{messages, add_generation_prompt, text}` or,
where the template raises, `error` in place of `text`. The templates are written here, minimal, with the constructs that
such models use: those of TinyLlama-Chat, Llama-2, Llama-3, Qwen, SmolLM2, and one with whatever else templates contain.
"""

import argparse
import json
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set first = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set first = false %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if loop.index0 == 0 and first != false %}"
    "{% set content = '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

ODDITIES = """{# a comment #}
{%- set ns = namespace(count=0, last='') -%}
{%- macro turn(role, text='') -%}
[{{ role | upper }}] {{ text }}
{%- endmacro -%}
{% for message in messages recursive %}
    {%- if message.content is string and message.content.startswith('skip') %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = message.role %}
    {%- if message.role == 'assistant' %}
    {% generation %}
{{ turn('a', message.content.split('|')[-1].lstrip('\\n')) }}
    {% endgeneration %}
    {%- else %}
  {{ turn(message.role, text=message['content'] | replace('x', 'y')) }}
    {%- endif %}
    {%- for key, value in message.items() %}{{ key }}={{ value | length }};{% endfor %}
{% endfor %}
{{ messages | tojson }}
{{ ns.count }} {{ ns.last.title() }} {{ none }} {{ true }} {{ missing is defined }} {{ bos_token ~ eos_token }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'yes' if add_generation_prompt else 'no' }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 'abc'[::-1] }} {{ 'a b'.split() | last }}
{{ messages[-1].get('content', 'none') }} {{ messages[-1].get('name', 'nobody') }} {{ range(3) | list | length }}
"""

TEMPLATES = {
    "zephyr": (ZEPHYR, "<s>", "</s>"),
    "llama-2": (LLAMA_2, "<s>", "</s>"),
    "chatml": (CHATML, None, "<|im_end|>"),
    "smol": (SMOL, "<|im_start|>", "<|im_end|>"),
    "llama-3": (LLAMA_3, "<|begin_of_text|>", "<|eot_id|>"),
    "oddities": (ODDITIES, "<s>", "</s>"),
}


def turn(role, content):
    return {"role": role, "content": content}


CONVERSATIONS = [
    [turn("user", "What do llamas eat?")],
    [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello | there."), turn("user", " Bye \n")],
    [turn("system", "  spaces \n\n"), turn("user", "x\n{{ 1 + 1 }} <b>&\"'</b> \u00e4\U0001f999\n\n")],
    [turn("user", "a"), turn("user", "b")],
    [turn("user", "skip me"), turn("assistant", "\n\nindented\n  text"), turn("user", "")],
    [turn("user", "one"), turn("assistant", "two")],
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    folder = parser.parse_args().out / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (template, bos, eos) in TEMPLATES.items():
        vocab = {token: i for i, token in enumerate(sorted({t for t in (bos, eos, "<unk>") if t}))}
        model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos)
        cases = []
        for messages in CONVERSATIONS:
            for add in (True, False):
                case = {"messages": messages, "add_generation_prompt": add}
                try:
                    case["text"] = tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=add
                    )
                except TemplateError as error:
                    case["error"] = str(error)
                cases.append(case)
        whole = {"name": name, "template": template, "bos": bos, "eos": eos, "cases": cases}
        text = json.dumps(whole, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
