"""Compares how `tinyllama finetune --samples` lays conversations out with transformers, and writes a golden file.

    python scripts/golden/chat_layout.py check TOKENIZER_DIR ROWS.jsonl [ROWS.jsonl ..]
    python scripts/golden/chat_layout.py write FILE     # tests/golden/chat_layout/layout.json

Rows are in guanaco's shape ({"text": "### Human: ..### Assistant: .."}); each is also written as messages, ShareGPT
and (its first question and answer) Alpaca. The texts of the templates are put together here in Python; tokens and their
characters are the tokenizer's own (`return_offsets_mapping`). transformers 5, `pip install transformers`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

from transformers import AutoTokenizer

PROGRAM = os.environ.get("TINYLLAMA", "target/release/tinyllama")
TEMPLATES = ["guanaco", "chatml", "zephyr", "llama-2", "alpaca"]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def turns_of(text):
    """The turns of guanaco's text."""
    parts = re.split(r"(### Human:|### Assistant:)", text)
    roles = {"### Human:": "user", "### Assistant:": "assistant"}
    return [(roles[mark], said.strip()) for mark, said in zip(parts[1::2], parts[2::2])]


def render(template, turns, eos, prompt=False):
    """A conversation in a template's words; with `prompt` up to where the assistant speaks next."""
    out = ALPACA if template == "alpaca" else ""
    for role, said in turns:
        if template == "guanaco":
            out += ("### Human: " if role == "user" else "### Assistant: ") + said
        elif template == "chatml":
            out += f"<|im_start|>{role}\n{said}<|im_end|>\n"
        elif template == "zephyr":
            out += f"<|{role}|>\n{said}{eos}\n"
        elif template == "llama-2":
            out += f"<s>[INST] {said} [/INST]" if role == "user" else f" {said} {eos}"
        else:
            out += ("### Instruction:\n" if role == "user" else "### Response:\n") + said + "\n\n"
    ends = {"guanaco": "### Assistant:", "chatml": "<|im_start|>assistant\n", "zephyr": "<|assistant|>\n", "alpaca": "### Response:\n"}
    return out + (ends.get(template, "") if prompt else "")


def layout(tokenizer, template, turns, loss_on):
    """ids and labels."""
    eos = tokenizer.eos_token or "</s>"
    bos = tokenizer.bos_token or "<s>"
    text = render(template, turns, eos).replace("<s>", bos) if template == "llama-2" else render(template, turns, eos)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if loss_on == "all":
        trained = [i > 0 or id != tokenizer.bos_token_id for i, id in enumerate(ids)]
    else:
        trained = [False] * len(ids)
        for i, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            fix = (lambda t: t.replace("<s>", bos)) if template == "llama-2" else (lambda t: t)
            start = len(fix(render(template, turns[:i], eos, prompt=True)))
            end = len(fix(render(template, turns[: i + 1], eos)))
            for k, (a, b) in enumerate(offsets):
                trained[k] |= a < end and b > start
    # What ends the last turn: eos, or a special token of the template.
    marks = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) if template == "chatml" else []
    special = {tokenizer.eos_token_id, *marks} - {None, tokenizer.unk_token_id}
    last = [id for id, (a, b) in zip(ids, offsets) if text[a:b].strip()][-1]
    if last not in special:
        ids, trained = ids + [tokenizer.eos_token_id], trained + [trained[-1]]
    # What the tokenizer puts before a text by itself, unless the template did.
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and ids[0] != tokenizer.bos_token_id:
        ids, trained = [tokenizer.bos_token_id] + ids, [False] + trained
    return ids, [id if on else -100 for id, on in zip(ids, trained)]


def write_rows(path, talks, form):
    with open(path, "w") as out:
        for turns in talks:
            if form == "guanaco":
                row = {"text": render("guanaco", turns, "")}
            elif form == "messages":
                row = {"messages": [{"role": r, "content": s} for r, s in turns]}
            elif form == "sharegpt":
                names = {"user": "human", "assistant": "gpt"}
                row = {"conversations": [{"from": names[r], "value": s} for r, s in turns]}
            else:
                row = {"instruction": turns[0][1], "input": "", "output": turns[1][1]}
            out.write(json.dumps(row) + "\n")


def ours(tokenizer_dir, rows, template, form, loss_on, n):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        data = {"train": rows, "template": template, "format": form, "loss_on": loss_on}
        json.dump({"initial_checkpoint_dir": tokenizer_dir, "train": {"max_steps": 1}, "finetune": {"data": data}}, config)
        config.flush()
        done = subprocess.run([PROGRAM, "finetune", config.name, "--samples", str(n)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(tokenizer_dir, files):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    talks = [turns_of(json.loads(line)["text"]) for file in files for line in open(file)]
    talks = [t for t in talks if any(r == "assistant" for r, _ in t) and all(s for _, s in t)]
    wrong = 0
    for form in ("guanaco", "messages", "sharegpt", "alpaca"):
        some = [t[:2] for t in talks if [r for r, _ in t[:2]] == ["user", "assistant"]] if form == "alpaca" else talks
        with tempfile.TemporaryDirectory() as folder:
            rows = os.path.join(folder, "rows.jsonl")
            write_rows(rows, some, form)
            for template in TEMPLATES:
                for loss_on in ("assistant", "all"):
                    got = ours(tokenizer_dir, rows, template, form, loss_on, len(some))
                    want = [layout(tokenizer, template, turns, loss_on) for turns in some]
                    equal = sum(g["ids"] == w[0] and g["labels"] == w[1] for g, w in zip(got, want))
                    wrong += len(some) - equal
                    print(f"{form:9} {template:8} {loss_on:9} {equal} of {len(some)} equal")
                    for i, (g, w) in enumerate(zip(got, want)):
                        if (g["ids"], g["labels"]) != w and os.environ.get("SHOW"):
                            at = next((k for k, (a, b) in enumerate(zip(zip(g["ids"], g["labels"]), zip(*w))) if a != b), None)
                            print("  row", i, "at", at, len(g["ids"]), len(w[0]), g["ids"][at - 3 : at + 3] if at else "", w[0][at - 3 : at + 3] if at else "", tokenizer.convert_ids_to_tokens(w[0][at - 3 : at + 3]) if at else "")
                            break
    sys.exit(1 if wrong else 0)


TALKS = [
    [("user", "Hi"), ("assistant", "Hello! How can I help?")],
    [("user", "Count to three."), ("assistant", "1, 2, 3"), ("user", "Once more."), ("assistant", "1,\n2,\n\n3")],
    [("user", "What is 2 + 2?\n"), ("assistant", "  4.  ")],
    [("user", "Gr\u00fc\u00df Gott \u2014 \u4f60\u597d"), ("assistant", "\U0001f999\U0001f999!")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def write(file):
    tokenizer = AutoTokenizer.from_pretrained("data/quickstart/tokenizer")
    cases = []
    for turns in TALKS:
        turns = [(role, said.strip()) for role, said in turns]
        for template in TEMPLATES:
            for loss_on in ("assistant", "all"):
                ids, labels = layout(tokenizer, template, turns, loss_on)
                messages = [{"role": role, "content": said} for role, said in turns]
                cases.append({"template": template, "loss_on": loss_on, "messages": messages, "ids": ids, "labels": labels})
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")


if __name__ == "__main__":
    check(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "check" else write(sys.argv[2])
