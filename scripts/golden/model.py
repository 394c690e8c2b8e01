"""Logits and gradients of small random models, from transformers (fp32, CPU, eager attention).

Writes into --out (default tests/golden/model):
  cases.json           [{name, config (a config.json), weights, io}]; NAME.v4 is NAME in the older
                       spelling, `rope_theta` + `rope_scaling`, that most published models have
  *.safetensors        weights under Hugging Face's names, shared by cases that differ in RoPE only
  *.io.safetensors     input_ids (B, T), logits (B, T, V); for some also loss (1,) and grad.NAME
  rope.json            inv_freq and attention factor of full-size RoPE scalings
"""

import argparse
import json
import os

import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA = dict(hidden_size=72, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9,
             num_key_value_heads=3, vocab_size=96, max_position_embeddings=64, rms_norm_eps=1e-5,
             tie_word_embeddings=False)
NEOX = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=96, max_position_embeddings=64, rotary_pct=0.25, layer_norm_eps=1e-5,
            use_parallel_residual=True, tie_word_embeddings=False)
SMALL = dict(hidden_size=36, intermediate_size=48, num_hidden_layers=1)

# name, base, changed keys, rope parameters, weights shared with, T, gradients too
CASES = [
    ("llama_gqa", LLAMA, {}, None, None, 24, True),
    ("llama_mqa", LLAMA, dict(num_key_value_heads=1), None, None, 24, False),
    ("llama_mha_tied", LLAMA, dict(num_key_value_heads=9, tie_word_embeddings=True), None, None, 24,
     True),
    ("llama_head_dim", LLAMA, dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2), None,
     None, 24, False),
    ("rope_theta", LLAMA, {}, dict(rope_theta=100000.0), "llama_gqa", 24, False),
    ("rope_linear", LLAMA, {}, dict(rope_type="linear", factor=4.0), "llama_gqa", 48, False),
    ("rope_dynamic_short", LLAMA, dict(max_position_embeddings=32),
     dict(rope_type="dynamic", factor=2.0), "llama_gqa", 24, False),
    ("rope_dynamic_long", LLAMA, dict(max_position_embeddings=32),
     dict(rope_type="dynamic", factor=2.0), "llama_gqa", 48, False),
    ("rope_yarn", LLAMA, {}, dict(rope_type="yarn", factor=4.0), "llama_gqa", 48, False),
    ("rope_yarn_keys", LLAMA, {},
     dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0,
          beta_slow=2.0, attention_factor=1.2), "llama_gqa", 48, False),
    ("rope_llama3", LLAMA, {},
     dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=16), "llama_gqa", 48, False),
    ("neox", NEOX, {}, None, None, 24, True),
    ("neox_sequential", NEOX, dict(use_parallel_residual=False), None, "neox", 24, False),
    ("neox_full_rotary", NEOX, dict(rotary_pct=1.0), None, "neox", 24, False),
    ("llama_bias", LLAMA, dict(attention_bias=True, mlp_bias=True, **SMALL), None, None, 24, True),
    ("rope_yarn_mscale", LLAMA, {},
     dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0,
          mscale_all_dim=0.5), "llama_gqa", 48, False),
    ("rope_yarn_no_truncate", LLAMA, {},
     dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0,
          truncate=False), "llama_gqa", 48, False),
    ("neox_theta", NEOX, dict(rotary_pct=0.5), dict(rope_theta=1000000.0), "neox", 24, False),
    ("neox_dynamic_long", NEOX, dict(rotary_pct=0.5, max_position_embeddings=32),
     dict(rope_type="dynamic", factor=2.0), "neox", 48, False),
    ("neox_yarn", NEOX, dict(rotary_pct=0.5),
     dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), "neox", 48, False),
]

ROPE = [
    ("llama3", 500000.0, 128, 131072, 131072,
     dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=8192)),
    ("yarn", 10000.0, 128, 16384, 16384,
     dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)),
    ("yarn_mscale", 10000.0, 64, 16384, 16384,
     dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0,
          mscale_all_dim=0.5)),
    ("dynamic_within", 10000.0, 64, 2048, 2048, dict(rope_type="dynamic", factor=2.0)),
    ("dynamic_beyond", 10000.0, 64, 2048, 4096, dict(rope_type="dynamic", factor=2.0)),
    ("linear", 10000.0, 64, 8192, 8192, dict(rope_type="linear", factor=4.0)),
]


def build(base, changes, rope):
    """A random model; every parameter away from zero and from its default."""
    keys = {**base, **changes}
    if rope:
        keys["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    kind = (LlamaConfig, LlamaForCausalLM) if base is LLAMA else (GPTNeoXConfig, GPTNeoXForCausalLM)
    config = kind[0](**keys)
    config._attn_implementation = "eager"
    model = kind[1](config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.normal_(0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return config, model


def config_json(config):
    """The saved config.json."""
    return json.loads(config.to_json_string(use_diff=False))


def older_json(config):
    """The same config.json as transformers 4 wrote it."""
    keys = config_json(config)
    rope = keys.pop("rope_parameters")
    partial = rope.pop("partial_rotary_factor", None)
    keys["rope_theta"] = rope.pop("rope_theta")
    if partial is not None:  # GPT-NeoX had its own names
        keys["rotary_pct"], keys["rotary_emb_base"] = partial, keys.pop("rope_theta")
    kind = rope.pop("rope_type")
    kind_key = "type" if kind in ("linear", "dynamic") else "rope_type"  # `type` is older still
    keys["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    return keys


def weights_of(model):
    tied = model.config.tie_word_embeddings
    return {k: v.contiguous() for k, v in model.state_dict().items()
            if not (tied and k == "lm_head.weight")}


def run(out):
    os.makedirs(out, exist_ok=True)
    cases, states = [], {}
    for seed, (name, base, changes, rope, shared, t, gradients) in enumerate(CASES):
        config, model = build(base, changes, rope)
        if shared:
            model.load_state_dict(states[shared], strict=False)
        else:
            states[name] = model.state_dict()
            save_file(weights_of(model), f"{out}/{name}.safetensors")
        ids = torch.randint(96, (2, t), generator=torch.Generator().manual_seed(100 + seed))
        logits = model(input_ids=ids).logits
        io = {"input_ids": ids, "logits": logits.detach()}
        if gradients:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 96),
                                                     ids[:, 1:].reshape(-1))
            loss.backward()
            io["loss"] = loss.detach().reshape(1)
            io.update({f"grad.{k}": p.grad for k, p in model.named_parameters()})
        save_file({k: v.contiguous() for k, v in io.items()}, f"{out}/{name}.io.safetensors")
        files = {"weights": f"{shared or name}.safetensors", "io": f"{name}.io.safetensors"}
        cases.append({"name": name, "config": config_json(config), **files})
        if rope or base is NEOX:
            older = older_json(config)
            assert_same_logits(older, model, ids)
            cases.append({"name": f"{name}.v4", "config": older, **files})
    write(f"{out}/cases.json", cases)
    write(f"{out}/rope.json", [rope_case(*case) for case in ROPE])


def assert_same_logits(keys, model, ids):
    """The real transformers reads this config.json as it reads the current spelling."""
    config = type(model.config)(**json.loads(json.dumps(keys)))
    config._attn_implementation = "eager"
    other = type(model)(config).float().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def rope_case(name, theta, dim, max_position, seq_len, rope):
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, max_position_embeddings=max_position,
                         rope_parameters={"rope_theta": theta, **rope})
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)
    return {"name": name, "rope_theta": theta, "head_dim": dim,
            "max_position_embeddings": max_position, "seq_len": seq_len, "rope_scaling": rope,
            "inv_freq": inv_freq.tolist(), "attention_factor": float(scaling)}


def write(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tests/golden/model")
    run(parser.parse_args().out)
