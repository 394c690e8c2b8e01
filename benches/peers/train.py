"""TinyLlama in plain PyTorch, the peer of `tinyllama bench train`: tokens a second of optimizer steps on random tokens.

    python benches/peers/train.py --micro-batch 16 --accumulation 1 --mode compile --precision mixed

--precision mixed   fp32 weights and AdamW state, bf16 autocast (our bf16-mixed)
--precision bf16    weights, gradients and AdamW state in bf16 (our bf16-true)
--mode eager | compile          --attention cudnn | flash | math
Prints one JSON object with the keys of `tinyllama bench train --json`.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.n_embd // c.n_head
        self.c, self.d = c, d
        self.norm_1 = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_groups) * d, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.norm_2 = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.gate_up = nn.Linear(c.n_embd, 2 * c.width, bias=False)
        self.down = nn.Linear(c.width, c.n_embd, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        h, g = self.c.n_head, self.c.n_groups
        qkv = self.qkv(self.norm_1(x)).view(b, t, h + 2 * g, self.d).transpose(1, 2)  # (B, H+2G, T, D)
        q, k, v = qkv.split([h, g, g], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(c.n_embd, c.vocab, bias=False)
        d = c.n_embd // c.n_head
        angle = torch.outer(torch.arange(c.block_size), 10_000.0 ** (-torch.arange(0, d, 2) / d))
        angle = torch.cat((angle, angle), -1)  # (T, D)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, target):
        x = self.wte(idx)  # (B, T, C)
        cos, sin = self.cos[: idx.shape[1]].float(), self.sin[: idx.shape[1]].float()
        for block in self.h:
            x = block(x, cos, sin)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mode", choices=["eager", "compile"], default="compile")
    p.add_argument("--precision", choices=["mixed", "bf16"], default="mixed")
    p.add_argument("--attention", choices=list(SDPA), default="cudnn")
    p.add_argument("--micro-batch", type=int, default=16)
    p.add_argument("--accumulation", type=int, default=1)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--warmup", type=int, default=10)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(n_layer=22, n_head=32, n_groups=4, n_embd=2048, width=5632, vocab=32000, block_size=2048)
    for name, value in sizes.items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    c = p.parse_args()

    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    cuda = c.device.startswith("cuda")
    model = Model(c).to(c.device)
    if c.precision == "bf16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda)
    step_model = torch.compile(model) if c.mode == "compile" else model
    autocast = torch.autocast(c.device.split(":")[0], torch.bfloat16) if c.precision == "mixed" else contextlib.nullcontext()

    def step():
        total = 0.0
        for _ in range(c.accumulation):
            idx = torch.randint(c.vocab, (c.micro_batch, c.block_size + 1)).to(c.device)
            with autocast, sdpa_kernel([SDPA[c.attention]] if cuda else list(SDPA.values())):
                loss = step_model(idx[:, :-1], idx[:, 1:]) / c.accumulation
            loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item()  # the CPU waits for the GPU here, once a step

    seconds, losses = [], []
    for i in range(c.warmup + c.steps):
        start = time.perf_counter()
        loss, norm = step()
        if not (loss == loss and norm == norm and abs(norm) != float("inf")):
            raise SystemExit(f"error: step {i + 1}: loss {loss}, gradient norm {norm}; not timed")
        losses.append(loss)
        if i >= c.warmup:
            seconds.append(time.perf_counter() - start)
    seconds.sort()
    tokens = c.micro_batch * c.accumulation * c.block_size
    at = lambda share: seconds[round((len(seconds) - 1) * share)]
    matmul = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith("wte"))
    attention = c.n_layer * c.n_embd * c.block_size
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = 989.4e12 if "H100" in name or "H200" in name else None
    speed = tokens / statistics.median(seconds)
    mfu = lambda flops: speed * flops / peak if peak else None
    print(json.dumps({
        "peer": f"PyTorch {torch.__version__}, {c.mode}, {c.attention} attention",
        "device": name,
        "precision": {"mixed": "fp32 weights, bf16 autocast", "bf16": "bf16"}[c.precision],
        "micro_batch_size": c.micro_batch,
        "accumulation": c.accumulation,
        "tokens_per_step": tokens,
        "steps": len(seconds),
        "step_seconds": statistics.median(seconds),
        "tokens_per_sec": speed,
        "tokens_per_sec_quartiles": [tokens / at(0.75), tokens / at(0.25)],
        "mfu": mfu(6 * matmul + 12 * attention),
        "mfu_causal": mfu(6 * matmul + 6 * attention),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "loss": [losses[0], losses[-1]],
    }, indent=2))


if __name__ == "__main__":
    main()
