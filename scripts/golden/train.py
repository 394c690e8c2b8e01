"""Twenty training steps with torch.optim.AdamW, for both families (fp32, CPU).

Writes into --out (default tests/golden/train), a folder a family:
  config.json, model.safetensors   where training starts
  data.safetensors                 tokens (steps, accumulation, micro, T + 1)
  expected.json                    settings; loss, grad_norm and lr of each step; of each final
                                   parameter, in fp64: l2, sum and abs_sum; bf16_mixed: loss and
                                   grad_norm of each step, to be met loosely (they differ by CPU)
and for both families
  packed/train_0000000000.bin      the same tokens as a LITPKDS v1 file of uint16: blocks of T + 1
  packed/order.json                block of each sequence, (steps, accumulation, micro)
The loss of a step is the mean over all its targets; the gradient norm is that before clipping.
`bf16_mixed` keeps fp32 masters and moments, computes with a bf16 copy of the weights made once a step,
and adds the micro-batches' bf16 gradients in fp32; logits go to the loss in fp32.
"""

import argparse
import copy
import json
import math
import os
import struct

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

STEPS, ACCUMULATION, MICRO, T, V = 20, 2, 2, 32, 128
SETTINGS = dict(lr_peak=1e-3, min_lr=1e-4, warmup=5, steps=STEPS, betas=[0.9, 0.95], weight_decay=0.1,
                eps=1e-8, max_norm=1.0)
COMMON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=V,
              max_position_embeddings=64, tie_word_embeddings=False)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(intermediate_size=160, num_key_value_heads=2,
                                            rms_norm_eps=1e-5, **COMMON)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(intermediate_size=256, rotary_pct=0.25, **COMMON)),
}


def lr_at(step):
    """Published formula at step 1, 2, ...: linear warmup, then half a cosine."""
    s = SETTINGS
    if step < s["warmup"]:
        return s["lr_peak"] * step / s["warmup"]
    ratio = (step - s["warmup"]) / (s["steps"] - s["warmup"])
    return s["min_lr"] + 0.5 * (1 + math.cos(math.pi * ratio)) * (s["lr_peak"] - s["min_lr"])


def accumulate(model, micros):
    """Backward over the micro-batches of a step; returns the step's loss."""
    total = 0.0
    for micro in micros:
        logits = model(input_ids=micro[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), micro[:, 1:].reshape(-1),
                                                 reduction="sum") / (ACCUMULATION * MICRO * T)
        loss.backward()
        total += loss.item()
        yield total


def train(model, tokens, mixed=False):
    """`mixed`: `model` holds the fp32 masters, a bf16 twin of it computes."""
    s = SETTINGS
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr_peak"], betas=s["betas"], eps=s["eps"],
                                  weight_decay=s["weight_decay"], foreach=False, fused=False)
    worker = copy.deepcopy(model).bfloat16() if mixed else model
    out = {"loss": [], "grad_norm": [], "lr": []}
    for step in range(1, STEPS + 1):
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for total in accumulate(worker, tokens[step - 1]):
            if mixed:
                move_gradients(worker, model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["max_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if mixed:
            refresh(worker, model)
        for key, value in (("loss", total), ("grad_norm", norm.item()), ("lr", lr)):
            out[key].append(value)
    return out


def move_gradients(worker, master):
    """Adds a micro-batch's bf16 gradients to the fp32 sums and clears them."""
    for p, m in zip(worker.parameters(), master.parameters()):
        m.grad = p.grad.float() if m.grad is None else m.grad + p.grad.float()
        p.grad = None


def refresh(worker, master):
    """The bf16 copy of the weights, once a step."""
    with torch.no_grad():
        for p, m in zip(worker.parameters(), master.parameters()):
            p.copy_(m)


def checksums(model):
    """fp64 sums over each parameter.

    The QKV bias of GPT-NeoX has no sums: softmax cancels a key bias where no rotary acts, so its gradient
    is rounding noise (2e-10), which Adam divides by its own size.
    """
    tensors = {name: p.detach().double() for name, p in model.named_parameters()}
    sums = {name: t for name, t in tensors.items() if not name.endswith("query_key_value.bias")}
    return {"l2": {name: t.norm().item() for name, t in tensors.items()},
            "sum": {name: t.sum().item() for name, t in sums.items()},
            "abs_sum": {name: t.abs().sum().item() for name, t in sums.items()}}


def random_walk():
    """Text-like data (steps, accumulation, micro, T + 1): there is something to learn."""
    generator = torch.Generator().manual_seed(8)
    steps = torch.randint(-2, 4, (STEPS, ACCUMULATION, MICRO, T + 1), generator=generator)
    return steps.cumsum(-1).remainder(V)


def write_packed(folder, tokens):
    """Magic, version 1, dtype code 8 (uint16), number of tokens; then the tokens, little-endian."""
    os.makedirs(folder, exist_ok=True)
    flat = tokens.reshape(-1).numpy().astype("<u2")
    with open(f"{folder}/train_0000000000.bin", "wb") as f:
        f.write(b"LITPKDS" + struct.pack("<QBQ", 1, 8, flat.size) + flat.tobytes())
    order = np.arange(STEPS * ACCUMULATION * MICRO).reshape(STEPS, ACCUMULATION, MICRO)
    with open(f"{folder}/order.json", "w") as f:
        json.dump({"block": T + 1, "order": order.tolist()}, f)
        f.write("\n")


def run(out):
    tokens = random_walk()
    write_packed(f"{out}/packed", tokens)
    for family, (kind, config) in FAMILIES.items():
        folder = f"{out}/{family}"
        os.makedirs(folder, exist_ok=True)
        config._attn_implementation = "eager"
        model = kind(config).float().train()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if p.ndim == 2:
                    p.normal_(0, 0.05, generator=generator)
        with open(f"{folder}/config.json", "w") as f:
            f.write(config.to_json_string(use_diff=False))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                  f"{folder}/model.safetensors")
        save_file({"tokens": tokens.contiguous()}, f"{folder}/data.safetensors")
        mixed = train(copy.deepcopy(model), tokens, mixed=True)
        expected = {**SETTINGS, **train(model, tokens), **checksums(model),
                    "bf16_mixed": {key: mixed[key] for key in ("loss", "grad_norm")}}
        with open(f"{folder}/expected.json", "w") as f:
            json.dump(expected, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tests/golden/train")
    run(parser.parse_args().out)
