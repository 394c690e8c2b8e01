"""Compares greedy output with transformers' `generate`, token by token, by hand.

    python scripts/golden/generate.py HF_FOLDER [NEW_TOKENS]

HF_FOLDER is a trained Llama; a second one of random weights is made beside it. Prompts of 1 to 2,000 tokens are
continued in fp32 by transformers, and by `tinyllama generate` (TINYLLAMA names another program): the plain loop, the
engine with one prompt, and the engine with all prompts at once. A difference is told together with the gap between the
two ids' logits, since two programs round differently.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PROGRAM = os.environ.get("TINYLLAMA", Path(__file__).resolve().parents[2] / "target/release/tinyllama")
LENGTHS = [1, 2, 3, 15, 16, 17, 64, 333, 1000, 2000]
logging.set_verbosity_error()
logging.disable_progress_bar()


def ours(folder, prompts, new, *options):
    lines = "\n".join(",".join(map(str, prompt)) for prompt in prompts)
    command = [PROGRAM, "generate", "--checkpoint", folder, "--device", "cpu", "--precision", "32-true", "--ids", "--json"]
    command += ["--temperature", "0", "--max-new-tokens", str(new), *options]
    out = subprocess.run(command, input=lines, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(out.stderr)
    return [json.loads(line)["tokens"] for line in out.stdout.splitlines()]


@torch.no_grad()
def theirs(model, prompt, new):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt):].tolist()


@torch.no_grad()
def gap(model, prompt, expected, got):
    """Where two outputs part, and how far apart the logits of the two ids are there."""
    at = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
    logits = model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    return f"token {at}: {expected[at]} and {got[at]}, {(logits[expected[at]] - logits[got[at]]).item():.1e} apart"


def compare(name, folder, new):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    torch.manual_seed(0)
    lengths = [n for n in LENGTHS if n + new <= limit]
    prompts = [torch.randint(vocab, (n,)).tolist() for n in lengths]
    expected = [theirs(model, prompt, new) for prompt in prompts]
    ways = {
        "plain loop": [ours(folder, [prompt], new, "--plain")[0] for prompt in prompts],
        "engine, alone": [ours(folder, [prompt], new)[0] for prompt in prompts],
        "engine, together": ours(folder, prompts, new, "--lines"),
    }
    for way, got in ways.items():
        equal = [a == b for a, b in zip(expected, got)]
        print(f"{name}, {way}: {sum(equal)} of {len(prompts)} prompts ({lengths[0]} to {lengths[-1]} tokens) "
              f"continued by the same {new} tokens")
        for prompt, a, b in zip(prompts, expected, got):
            if a != b:
                print(f"  prompt of {len(prompt)}: {gap(model, prompt, a, b)}")


def random_model(folder):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2304,
                         initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)


def main():
    new = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    with tempfile.TemporaryDirectory() as folder:
        random_model(folder)
        compare("random weights", folder, new)
    compare("trained", sys.argv[1], new)


main()
