"""Compares GGUF files that were written here with the real llama.cpp and transformers, by hand.

    python scripts/golden/gguf_peers.py HF_FOLDER [TEXT]     (pip install llama-cpp-python, transformers)

HF_FOLDER is a Llama with its tokenizer. It is converted to F32 and F16 GGUF by `tinyllama convert`; llama.cpp must
continue prompts as transformers does, greedily, token for token. For each quantised scheme the perplexity of TEXT (a
file) by llama.cpp is compared for two files: ours, and llama.cpp's own quantisation of the F32 one.
"""

import ctypes
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROGRAM = Path(__file__).resolve().parents[2] / "target/release/tinyllama"
PROMPTS = ["The capital of France is", "def main():\n    ", "Once upon a time, in a small village", "1, 2, 3, 4,"]
SCHEMES = {"Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q4_0": 2}  # llama.h: LLAMA_FTYPE_MOSTLY_*


def convert(source, target, *options):
    subprocess.run([PROGRAM, "convert", source, target, "--to", "gguf", *options], check=True, capture_output=True)


def open_model(path, context=512):
    return llama_cpp.Llama(str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=2)


def greedy(model, ids, n):
    ids = list(ids)
    model.reset()
    model.eval(ids)
    for _ in range(n):
        logits = model.scores[model.n_tokens - 1]
        ids.append(int(np.argmax(logits)))
        model.eval(ids[-1:])
    return ids


def perplexity(model, ids, context=512, windows=8):
    total, count = 0.0, 0
    for start in range(0, min(len(ids) - context, windows * context), context):
        window = ids[start:start + context]
        model.reset()
        model.eval(window)
        logits = torch.tensor(model.scores[: context])
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum")
        total, count = total + losses.item(), count + context - 1
    return math.exp(total / count)


def quantize(source, target, ftype):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert code == 0, "llama.cpp could not quantise"


def main():
    logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else None
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = Path(tempfile.mkdtemp())
    for scheme in ["F32", "F16"]:
        path = out / f"{scheme}.gguf"
        convert(folder, path, "--quantize", scheme)
        model = open_model(path)
        same_ids = same_texts = 0
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            same_ids += model.tokenize(prompt.encode(), special=False) == ids
            want = reference.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)
            same_texts += greedy(model, ids, 40) == want[0].tolist()
        print(f"{scheme}: {same_ids} of {len(PROMPTS)} prompts with the same ids, {same_texts} continued the same")
    if text is None:
        return
    model = open_model(out / "F32.gguf")
    ids = model.tokenize(text.encode(), special=False)
    whole = perplexity(model, ids)
    print(f"F32: perplexity {whole:.4f} of {len(ids)} tokens")
    del model
    for scheme, ftype in SCHEMES.items():
        ours, theirs = out / f"ours-{scheme}.gguf", out / f"theirs-{scheme}.gguf"
        convert(folder, ours, "--quantize", scheme)
        quantize(out / "F32.gguf", theirs, ftype)
        a, b = perplexity(open_model(ours), ids), perplexity(open_model(theirs), ids)
        sizes = [path.stat().st_size for path in (ours, theirs)]
        print(f"{scheme}: ours {a:.4f}, llama.cpp's {b:.4f}, {100 * (a / b - 1):+.2f} %; bytes {sizes}", flush=True)


main()
