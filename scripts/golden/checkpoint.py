"""Checkpoints between this project and Hugging Face transformers.

    python scripts/golden/checkpoint.py configs tests/golden/checkpoint
    python scripts/golden/checkpoint.py check DIR

`configs` writes `config.json` of many models as one version of transformers saves them; run it with
transformers==4.46.3 and with transformers==5.23.0 (torch==2.11.0): the suite holds the two forms to one meaning.

`check` reads what the ignored test `folders_for_transformers` of the suite wrote into DIR
(`TINYLLAMA_PARITY_DIR=DIR cargo test --release folders_for_transformers -- --ignored`), loads each folder with
`AutoModelForCausalLM.from_pretrained`, and compares logits.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

TOLERANCE = 2e-4
NEW = int(transformers.__version__.split(".")[0]) >= 5

LLAMA = dict(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
# Heads of 16 dimensions, of which 4 rotate: with 2 there is one frequency, base^0, and no base is ever wrong.
NEOX = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, rotary_pct=0.25, rotary_emb_base=30_000, bos_token_id=0, eos_token_id=0)
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}


def configs():
    """Name -> configuration, the same meaning whatever form this version of transformers has."""
    rope = lambda scaling, base: (
        {"rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": base}} if NEW
        else {"rope_theta": base, "rope_scaling": scaling})
    out = {"llama": LlamaConfig(**LLAMA, **rope(None, 10_000.0)),
           "llama_tied": LlamaConfig(**LLAMA, tie_word_embeddings=True, **rope(None, 100_000.0)),
           "llama_bias": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, **rope(None, 10_000.0)),
           "llama_head_dim": LlamaConfig(**LLAMA, head_dim=8, **rope(None, 10_000.0)),
           "neox": GPTNeoXConfig(**NEOX),
           "neox_sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False)}
    for name, scaling in SCALINGS.items():
        out[f"llama_{name}"] = LlamaConfig(**LLAMA, **rope(dict(scaling), 500_000.0))
    return out


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def write_configs(out):
    """Only the `config.json` files, one file a version."""
    all_configs = {name: json.loads(config.to_json_string()) for name, config in configs().items()}
    for name, config in all_configs.items():
        kind = {"l": "LlamaForCausalLM", "n": "GPTNeoXForCausalLM"}[name[0]]
        config["architectures"] = [kind]
    path = out / f"configs-{transformers.__version__}.json"
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(config)}" for name, config in all_configs.items())
    path.write_text("{\n" + lines + "\n}\n")
    print(path)


def check(folder):
    """Loads what we wrote and compares; exits 1 on any difference."""
    failed = False
    cases = sorted(p for p in folder.iterdir() if (p / "config.json").exists())
    for case in cases:
        expected = load_file(folder / f"{case.name}.expected.safetensors")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(case, output_loading_info=True, **AUTO)
        except Exception as error:
            failed = True
            print(f"{case.name:18} BAD {str(error).splitlines()[0]}")
            continue
        keys = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        clean = not any(keys.values())
        dtype = next(model.parameters()).dtype
        difference = (logits_of(model.eval(), expected["tokens"]) - expected["logits"]).abs().max().item()
        # Rounded weights: only the loading counts.
        ok = clean and (difference <= TOLERANCE or dtype == torch.bfloat16)
        failed |= not ok
        ids = (model.generation_config.bos_token_id, model.generation_config.eos_token_id)
        print(f"{case.name:18} {'ok ' if ok else 'BAD'} max |difference| {difference:.2e}  {dtype}  "
              f"bos/eos {ids}  {'' if clean else keys}")
    print(f"{len(cases)} folders, transformers {transformers.__version__}")
    sys.exit(1 if failed or not cases else 0)


AUTO = {"dtype": "auto"} if NEW else {"torch_dtype": "auto"}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    verb, path = sys.argv[1], Path(sys.argv[2])
    {"configs": write_configs, "check": check}[verb](path)
