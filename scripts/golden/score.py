"""Scores tokens with the real transformers, as `tinyllama score --json` does.

    python scripts/golden/score.py CHECKPOINT_DIR 1,2,3
"""

import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM


def main(folder, tokens):
    tokens = [int(t) for t in tokens.split(",")]
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
    main(*sys.argv[1:])
