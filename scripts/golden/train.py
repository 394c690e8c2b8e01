"""Twenty training steps with torch.optim.AdamW, for both families (fp32, CPU).

Writes into --out (default tests/golden/train), a folder a family:
  config.json, model.safetensors   where training starts
  data.safetensors                 tokens (steps, accumulation, micro, T + 1)
  expected.json                    settings; loss, grad_norm and lr of each step; final L2 norms
The loss of a step is the mean over all its targets; the gradient norm is that before clipping.
"""

import argparse
import json
import math
import os

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


def train(model, tokens):
    s = SETTINGS
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr_peak"], betas=s["betas"], eps=s["eps"],
                                  weight_decay=s["weight_decay"], foreach=False, fused=False)
    out = {"loss": [], "grad_norm": [], "lr": []}
    for step in range(1, STEPS + 1):
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for micro in tokens[step - 1]:
            logits = model(input_ids=micro[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), micro[:, 1:].reshape(-1),
                                                     reduction="sum") / (ACCUMULATION * MICRO * T)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["max_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, value in (("loss", total), ("grad_norm", norm.item()), ("lr", lr)):
            out[key].append(value)
    out["l2"] = {name: p.detach().double().norm().item() for name, p in model.named_parameters()}
    return out


def run(out):
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
        # Text-like data: a random walk, so that there is something to learn.
        generator = torch.Generator().manual_seed(8)
        steps = torch.randint(-2, 4, (STEPS, ACCUMULATION, MICRO, T + 1), generator=generator)
        tokens = steps.cumsum(-1).remainder(V)
        save_file({"tokens": tokens.contiguous()}, f"{folder}/data.safetensors")
        with open(f"{folder}/expected.json", "w") as f:
            json.dump({**SETTINGS, **train(model, tokens)}, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tests/golden/train")
    run(parser.parse_args().out)
