#!/usr/bin/env python3
"""Writes tests/golden/metrics/schedule.json: learning rates by the published formula.

Standard library only. `--check` compares with the committed file instead of writing it.
The cosine is lit-gpt's `get_lr(it)` with its iterations read as optimizer steps; `wsd` is
warmup, stable, then a straight line over the last `decay_fraction` of the run.
"""

import json
import math
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests/golden/metrics/schedule.json"


def get_lr(it, schedule, lr, min_lr, warmup, total, decay_fraction):
    # 1) linear warmup for `warmup` steps
    if it < warmup:
        return lr * it / warmup
    if schedule == "constant":
        return lr
    # 2) past the end: the minimum
    if it > total:
        return min_lr
    # 3) in between: cosine, or stable and then linear, down to the minimum
    if schedule == "cosine":
        decay_ratio = (it - warmup) / (total - warmup)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (lr - min_lr)
    start = max(total * (1 - decay_fraction), warmup)
    return lr if it <= start else lr + (it - start) / (total - start) * (min_lr - lr)


def steps(warmup, total):
    """Corners, their neighbours, and points between."""
    corners = [1, warmup - 1, warmup, warmup + 1, total - 1, total, total + 1, 2 * total]
    between = [total * k // 8 for k in range(1, 8)] + [total * 9 // 10 - 1, total * 9 // 10 + 1]
    return sorted({s for s in corners + between if s >= 1})


CASES = [
    # the published TinyLlama run
    dict(schedule="cosine", lr=4e-4, min_lr=4e-5, warmup=2000, total=1430512, decay_fraction=0.1),
    dict(schedule="cosine", lr=2e-4, min_lr=2e-5, warmup=0, total=10000, decay_fraction=0.1),
    dict(schedule="cosine", lr=3e-3, min_lr=0.0, warmup=10, total=300, decay_fraction=0.1),
    dict(schedule="constant", lr=1e-5, min_lr=0.0, warmup=100, total=1000, decay_fraction=0.1),
    dict(schedule="wsd", lr=1e-3, min_lr=1e-5, warmup=200, total=5000, decay_fraction=0.1),
    dict(schedule="wsd", lr=6e-4, min_lr=0.0, warmup=50, total=1000, decay_fraction=0.35),
]


def main():
    rows = []
    for case in CASES:
        values = [[s, get_lr(s, **case)] for s in steps(case["warmup"], case["total"])]
        row = json.dumps(case)[:-1] + ',\n "values": ' + json.dumps(values) + "}"
        rows.append(row)
    text = "[" + ",\n".join(rows) + "]\n"
    if "--check" in sys.argv[1:]:
        if OUT.read_text() != text:
            sys.exit(f"error: {OUT} is not what this script writes")
        print(f"schedule: {len(CASES)} cases equal to {OUT.name}")
    else:
        OUT.write_text(text)
        print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
