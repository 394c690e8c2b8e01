#!/usr/bin/env python3
"""The tables of docs/scaling.md: memory a card, bytes a step and predicted efficiency of every strategy.

    python3 scripts/scaling.py

Arithmetic, not measurements, but for two numbers: the seconds of a micro-batch on one card, and by how much it is slower
beside communication. A collective over n ranks in a ring moves (n - 1)/n of its bytes through each card at the bus
bandwidth, and takes a latency a hop. Weights travel in 2 bytes, gradients in 4. What travels is hidden behind the
micro-batch as far as it is shorter; the first gather and the last reduction are not. A smaller micro-batch counts as fast
by token, which flatters 1,024 cards.
"""

# Name, parameters, blocks, width, vocabulary, micro-batch of 2,048 tokens, its seconds on one H100, the optimizer's, and
# activations with the head's in GiB (`pretrain --dry-run`). 1.1B: `bench train` (docs/performance.md). 7B: the same
# FLOP/s, by arithmetic.
MODELS = [
    ("1.1B", 1_100_048_384, 22, 2048, 32000, 16, 0.400, 0.0126, 34.0),
    ("7B", 6_738_415_616, 32, 4096, 32000, 4, 0.640, 0.077, 28.0),
]
GLOBAL = 1024  # sequences a step: 2,097,152 tokens
NODE = 8
GIB = 1 << 30
NVLINK = 350e9  # bytes/s of a ring within a node, bus bandwidth as nccl-tests count it
NETWORK = 45e9  # of one 400 Gb/s link
HOP, NETWORK_HOP = 2e-6, 6e-6  # seconds
# A micro-batch beside communication takes so much longer: multiprocessors, memory and power are shared. Measured on pairs
# and fours of H200: 2.3 to 5.7 % with 1.1B at 16 x 2,048 (docs/scaling.md).
BESIDE = 0.05


def ring(size, ranks, links, replicas_of=1):
    """Seconds and bytes through a card of an all-gather or a reduce-scatter of `size` bytes."""
    if ranks == 1:
        return 0.0, 0.0
    across = ranks > NODE or replicas_of > 1
    bandwidth = min(NVLINK, links * NETWORK / replicas_of) if across else NVLINK
    hops = ranks - 1
    far = hops if replicas_of > 1 else (-(-ranks // NODE) if across else 0)
    moved = size * hops / ranks
    return moved / bandwidth + (hops - far) * HOP + far * NETWORK_HOP, moved


def plan(model, ranks, strategy, links, whole, accumulation=None):
    _, params, blocks, width, vocabulary, micro, seconds, optimizer, activations = model
    shards = {"full_shard": ranks, "shard_grad_op": ranks, "hybrid_shard": min(NODE, ranks), "ddp": 1}[strategy]
    replicas = ranks // shards
    shares = strategy in ("full_shard", "hybrid_shard")
    fewer = 1 if whole else min(micro, GLOBAL // ranks) / micro  # at 1,024 cards each has one sequence
    seconds, activations = seconds * fewer, activations * fewer
    accumulation = accumulation or max(1, GLOBAL // (micro * ranks))
    unit = max(vocabulary * width, (params - 2 * vocabulary * width) // blocks)
    slots = 2 * unit if shares and shards > 1 else 0
    kept = lambda whole: whole / shards
    weights = 2 * (kept(params) + slots if shares else params)
    gradients = 4 * (kept(params) + slots if shares else params)
    state = 12 * params / shards
    memory = (weights + gradients + state) / GIB + activations

    units, time, moved = blocks + 2, 0.0, 0.0
    def go(size, ranks_, times, replicas_of=1):
        nonlocal time, moved
        t, b = ring(size / units, ranks_, links, replicas_of)
        time += t * units * times
        moved += b * units * times
        return t
    edges = 0.0
    if shares:
        edges += go(2 * params, shards, 2 * accumulation) + go(4 * params, shards, accumulation)
    elif shards > 1:
        edges += go(4 * params, shards, 1) + go(2 * params, shards, 1)
    if replicas > 1:  # an all-reduce is a reduce-scatter and an all-gather; the cards of a node share its links
        edges += go(4 * params / shards, replicas, 2, replicas_of=min(NODE, shards)) if replicas > 1 else 0.0
    compute = accumulation * seconds
    # Where the strategy reduces once, only the last micro-batch is there to hide it.
    window = compute if shares else seconds
    beside = BESIDE * window if ranks > 1 else 0.0
    step = compute + beside + max(0.0, time - window) + edges + optimizer / shards
    return memory, moved / 1e9, min(1.0, (compute + optimizer) / step), accumulation


def table(model):
    print(f"\n### {model[0]}, micro-batch {model[5]} x 2,048 tokens\n")
    print("| cards | strategy | accumulation | GiB a card | GB through a card a step | efficiency, 8 links a node | 1 link a node |")
    print("|---|---|---|---|---|---|---|")
    for ranks, whole in ((1, False), (8, False), (16, False), (64, False), (1024, False), (1024, True)):
        for strategy in ("full_shard", "hybrid_shard", "shard_grad_op", "ddp"):
            if ranks == 1 and strategy != "ddp" or ranks == 8 and strategy == "hybrid_shard":
                continue
            memory, moved, eight, accumulation = plan(model, ranks, strategy, 8, whole)
            one = plan(model, ranks, strategy, 1, whole)[2]
            name = strategy if ranks > 1 else "alone"
            fits = "" if memory < 78 else " (does not fit 80 GB)"
            star = "*" if whole else ""
            print(f"| {ranks:,}{star} | `{name}` | {accumulation} | {memory:.1f}{fits} | {moved:.1f} | {eight:.1%} | {one:.1%} |")


def one_node(model):
    """Efficiency on the cards of one node, to be set beside measurements."""
    print(f"\n### {model[0]} on one node, micro-batch {model[5]}, accumulation 1 and 8\n")
    for strategy in ("full_shard", "shard_grad_op", "ddp"):
        cells = [plan(model, ranks, strategy, 8, True, a)[2] for ranks in (2, 4, 8) for a in (1, 8)]
        print(f"| `{strategy}` | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")


one_node(MODELS[0])
for model in MODELS:
    table(model)
