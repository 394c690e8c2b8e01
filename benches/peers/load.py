"""Loading a checkpoint with safetensors and torch.load, for benches/load.sh; and a checkpoint of random weights for it.

    load.py make FOLDER      TinyLlama-1.1B in bf16: config.json, model.safetensors, and the same as pytorch_model.bin
    load.py time FOLDER      GB/s of reading every tensor into new memory, best of 3 after one that is not counted
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def shapes():
    yield "model.embed_tokens.weight", (32000, 2048)
    for i in range(22):
        layer = f"model.layers.{i}."
        for name, rows, columns in [("q", 2048, 2048), ("k", 256, 2048), ("v", 256, 2048), ("o", 2048, 2048)]:
            yield f"{layer}self_attn.{name}_proj.weight", (rows, columns)
        for name, rows, columns in [("gate", 5632, 2048), ("up", 5632, 2048), ("down", 2048, 5632)]:
            yield f"{layer}mlp.{name}_proj.weight", (rows, columns)
        for name in ["input", "post_attention"]:
            yield f"{layer}{name}_layernorm.weight", (2048,)
    yield "model.norm.weight", (2048,)
    yield "lm_head.weight", (32000, 2048)


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {name: (torch.randn(shape) / 50).bfloat16() for name, shape in shapes()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def from_safetensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        # A slice is a copy; get_tensor alone may be a map, whose pages are read later.
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def from_torch(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def from_torch_mapped(folder):
    mapped = torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True)
    return {name: tensor.clone() for name, tensor in mapped.items()}


def measure(folder):
    for name, load in [("safetensors", from_safetensors), ("torch.load", from_torch),
                       ("torch.load, mmap", from_torch_mapped)]:
        best = 0.0
        for i in range(4):
            start = time.perf_counter()
            tensors = load(folder)
            seconds = time.perf_counter() - start
            size = sum(t.nbytes for t in tensors.values())
            best = max(best, size / seconds if i else 0.0)
            del tensors
        print(f"{name:<20}{best / 1e9:>8.2f} GB/s", flush=True)


{"make": make, "time": measure}[sys.argv[1]](Path(sys.argv[2]))
