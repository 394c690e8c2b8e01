#!/usr/bin/env python3
"""Golden values of the sampling warpers, from transformers.

Pinned: torch==2.11.0, transformers==5.0.0.  Writes tests/golden/generate/sampling.json:
    python scripts/golden/sampling.py [OUT]
Each case holds V logits, the ids seen before, the parameters, and what transformers leaves: logits
after the repetition penalty, after all warpers (null = -inf), and their softmax.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
assert transformers.__version__ == "5.0.0", transformers.__version__

VOCAB = 24


def case(name, logits, seen, temperature=1.0, top_k=None, top_p=1.0, penalty=1.0):
    """transformers' order is temperature, top-k, top-p; top-k first, as here, leaves the same."""
    ids = torch.tensor([seen], dtype=torch.long)
    scores = logits[None].clone()
    penalised = scores
    if penalty != 1.0:
        penalised = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
    warped = penalised
    if temperature != 1.0:
        warped = TemperatureLogitsWarper(temperature)(ids, warped)
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(ids, warped)
    if top_p < 1.0:
        warped = TopPLogitsWarper(top_p)(ids, warped)
    return {
        "name": name,
        "logits": logits.tolist(),
        "seen": seen,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": penalty,
        "penalised": penalised[0].tolist(),
        "warped": [None if x == float("-inf") else x for x in warped[0].tolist()],
        "probs": warped[0].softmax(-1).tolist(),
    }


def main():
    torch.manual_seed(20)
    random = lambda: torch.randn(VOCAB) * 3
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5] + [-1.0] * (VOCAB - 5))
    # Not all equal: torch.sort leaves the order of equal logits open.
    flat = torch.arange(VOCAB) * 1e-3
    peaked = torch.full((VOCAB,), -20.0)
    peaked[7] = 20.0
    cases = [
        case("plain", random(), []),
        case("temperature", random(), [], temperature=0.7),
        case("hot", random(), [], temperature=2.5),
        case("top_k", random(), [], top_k=5),
        case("top_k of 1", random(), [], top_k=1),
        case("top_k beyond the vocabulary", random(), [], top_k=1000),
        case("top_k with ties at the border", tied, [], top_k=2),
        case("top_p", random(), [], top_p=0.8),
        case("top_p, small", random(), [], top_p=0.05),
        case("top_p of a nearly flat distribution", flat, [], top_p=0.51),
        case("top_p of a peaked distribution", peaked, [], top_p=0.9),
        case("penalty", random(), [0, 3, 3, 7, 23], penalty=1.3),
        case("penalty below 1", random(), [1, 2], penalty=0.8),
        case("all", random(), [5, 6, 5], temperature=0.8, top_k=12, top_p=0.9, penalty=1.1),
        case("all, sharp", random(), [9], temperature=0.3, top_k=6, top_p=0.95, penalty=1.5),
    ]
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/generate/sampling.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {"torch": "2.11.0", "transformers": "5.0.0", "script": "scripts/golden/sampling.py"}
    lines = ",\n".join("  " + json.dumps(c) for c in cases)
    out.write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
