"""Published configurations, parameter counts and initial deviations of every preset.

Writes into --out (default tests/golden):
  model/presets.json  {preset: config.json of the published checkpoint}
  model/params.json   {preset: number of parameters}, counted by transformers on the meta device
  init/init.json      {preset: {"n_embd", "n_layer", "mlp", "plain", "residual", "std": {tensor: deviation}}}

A tied head is counted once. `std` names each kind of tensor as lit-gpt does; norms and biases are
constants (1 and 0) and have no entry.

Sources: the `config.json` beside each published checkpoint, cross-checked field by field with litgpt's
`config.py`; the presets that were never published in that form say so below.
"""

import argparse
import json
import math
import os

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM


def llama(layers, heads, kv_heads, hidden, mlp, context, vocab=32000, **keys):
    """A Llama's config.json; what no key changes is as in all published ones."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": False, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden,
        "intermediate_size": mlp, "max_position_embeddings": context, "vocab_size": vocab, **keys}


def pythia(layers, heads, hidden, vocab=50304, context=2048):
    """A Pythia's config.json; its vocabulary is the padded one, the tokenizer knows 50,254 ids."""
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "tie_word_embeddings": False, "num_hidden_layers": layers,
        "num_attention_heads": heads, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "max_position_embeddings": context, "vocab_size": vocab}


PRESETS = {
    # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "tiny-llama-1.1b": llama(22, 32, 4, 2048, 5632, 2048),
    # tiny_LLaMA_120M and code_tiny_LLaMA_1b of the TinyLlama repository, not published as config.json:
    # condense_ratio 4 is linear scaling by 4.
    "tiny-llama-120m": llama(12, 12, 1, 768, 2048, 2048),
    "code-tiny-llama-1b": llama(22, 32, 4, 2048, 5632, 8192,
                                rope_scaling={"rope_type": "linear", "factor": 4.0}),
    # keeeeenw/MicroLlama
    "micro-llama-300m": llama(12, 16, 4, 1024, 5632, 2048),
    # meta-llama/Llama-2-{7b,13b,70b}-hf
    "Llama-2-7b": llama(32, 32, 32, 4096, 11008, 4096),
    "Llama-2-13b": llama(40, 40, 40, 5120, 13824, 4096),
    "Llama-2-70b": llama(80, 64, 8, 8192, 28672, 4096),
    # openlm-research/open_llama_3b
    "open_llama_3b": llama(26, 32, 32, 3200, 8640, 2048, rms_norm_eps=1e-6),
    # HuggingFaceTB/SmolLM2-{135M,360M,1.7B}
    "SmolLM2-135M": llama(30, 9, 3, 576, 1536, 8192, vocab=49152, rope_theta=100000.0,
                          tie_word_embeddings=True),
    "SmolLM2-360M": llama(32, 15, 5, 960, 2560, 8192, vocab=49152, rope_theta=100000.0,
                          tie_word_embeddings=True),
    "SmolLM2-1.7B": llama(24, 32, 32, 2048, 8192, 8192, vocab=49152, rope_theta=130000.0,
                          tie_word_embeddings=True),
    # EleutherAI/pythia-*: the two smallest have shorter contexts, the two largest a wider vocabulary.
    "pythia-14m": pythia(6, 4, 128, context=512),
    "pythia-31m": pythia(6, 8, 256, context=1024),
    "pythia-70m": pythia(6, 8, 512),
    "pythia-160m": pythia(12, 12, 768),
    "pythia-410m": pythia(24, 16, 1024),
    "pythia-1b": pythia(16, 8, 2048),
    "pythia-1.4b": pythia(24, 16, 2048),
    "pythia-2.8b": pythia(32, 32, 2560),
    "pythia-6.9b": pythia(32, 32, 4096, vocab=50432),
    "pythia-12b": pythia(36, 40, 5120, vocab=50688),
}

# Published counts that this script must meet.
PUBLISHED = {"tiny-llama-1.1b": 1_100_048_384, "tiny-llama-120m": 121_129_728,
             "Llama-2-7b": 6_738_415_616, "Llama-2-13b": 13_015_864_320, "Llama-2-70b": 68_976_648_192,
             "SmolLM2-135M": 134_515_008, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944,
             "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808,
             "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320}


def build_on_meta(keys):
    """The model without storage."""
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM)}
    config_class, model_class = kinds[keys["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class(**keys))
    model.tie_weights()  # the constructor leaves that out on the meta device
    return model


def count(keys):
    """Parameters of the real transformers model; `parameters()` gives a tied head once."""
    return sum(p.numel() for p in build_on_meta(keys).parameters())


def deviations(keys):
    """lit-gpt's `_init_weights` (2023-11-09 and later), one entry a kind of tensor.

    Every Linear and Embedding is N(0, sqrt(2 / 5 / C)). Then, in blocks only, `attn.proj` and the
    SwiGLU's last matrix are N(0, 1 / sqrt(C) / L). The rule names LLaMAMLP and CausalSelfAttention, so
    the GELU MLP's `proj` of the GPT-NeoX family keeps the plain deviation.
    """
    c, layers = keys["hidden_size"], keys["num_hidden_layers"]
    plain, residual = math.sqrt(2 / 5 / c), 1 / math.sqrt(c) / layers
    is_llama = keys["model_type"] == "llama"
    std = {"transformer.wte.weight": plain, "attn.qkv.weight": plain, "attn.proj.weight": residual}
    if is_llama:
        std |= {"mlp.fc_1.weight": plain, "mlp.fc_2.weight": plain, "mlp.proj.weight": residual}
    else:
        std |= {"mlp.fc.weight": plain, "mlp.proj.weight": plain}
    if not keys["tie_word_embeddings"]:
        std["lm_head.weight"] = plain
    return {"n_embd": c, "n_layer": layers, "mlp": "LLaMAMLP" if is_llama else "GptNeoxMLP",
            "plain": plain, "residual": residual, "std": std}


def run(out):
    params = {name: count(keys) for name, keys in PRESETS.items()}
    for name, want in PUBLISHED.items():
        assert params[name] == want, f"{name}: expected {want:,} parameters, got {params[name]:,}"
    init = {name: deviations(keys) for name, keys in PRESETS.items()}
    published = {"tiny-llama-1.1b": (0.013975, 0.0010044), "tiny-llama-120m": (0.022822, 0.003007)}
    for name, (plain, residual) in published.items():
        assert abs(init[name]["plain"] - plain) < 1e-6, name
        assert abs(init[name]["residual"] - residual) < 1e-6, name
    write(f"{out}/model/presets.json", PRESETS)
    write(f"{out}/model/params.json", params)
    write(f"{out}/init/init.json", init)


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tests/golden")
    run(parser.parse_args().out)
