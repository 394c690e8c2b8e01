"""Scores text or tokens with the real transformers, as `tinyllama score --json` does.

    python scripts/golden/score.py CHECKPOINT_DIR 1,2,3
    python scripts/golden/score.py CHECKPOINT_DIR "Call me Ishmael."

Digits and commas alone are token ids; anything else is text for the folder's own tokenizer. Prints
{"tokens": [...], "logprobs": [null, ...], "nll": mean, "ppl": exp(nll)}: natural logs, fp32.
"""

import json
import math
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def tokens_of(folder, text):
    if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        return [int(t) for t in text.split(",")]
    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def main(folder, text):
    tokens = tokens_of(folder, text)
    if len(tokens) < 2:
        sys.exit(f"error: expected at least 2 tokens to score, got {len(tokens)}")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                       output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    picked = [logprobs[i, t].item() for i, t in enumerate(tokens[1:])]
    nll = -sum(picked) / len(picked)
    print(json.dumps({"tokens": tokens, "logprobs": [None, *picked], "nll": nll,
                      "ppl": math.exp(nll)}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
