"""One small Llama as other programs save it: tests/golden/foreign/.

hf/                 what transformers writes: config.json and model.safetensors. The others hold the same model
hf-bin/             config.json and two pytorch_model-*.bin with their index
litgpt/             model_config.yaml and lit_model.pth: litgpt since December 2024
tinyllama/          iter-000007-ckpt.pth of TinyLlama's pretrain/tinyllama.py on several GPUs: weights, AdamW by name
lightning/          the same of one GPU, AdamW by number, behind torch.compile and DDP
meta/               params.json and two consolidated.*.pth, cut as Llama 2's
llama2c.bin         version 0; llama2c-v1.bin: version 1, with a head of its own
moments.safetensors exp_avg and exp_avg_sq by Hugging Face's names, that the two training checkpoints hold

Run with real torch, safetensors and transformers: python scripts/golden/foreign.py [OUT]
"""

import json
import struct
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/foreign")
L, H, G, C, F, V, T = 2, 4, 2, 32, 48, 64, 64
D = C // H


def model():
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=G, max_position_embeddings=T, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, 0, 0.2)
    return llama


def lit(hf, tiny):
    """litgpt's names; with `tiny` TinyLlama's, its QKV group by group."""
    out = {"lm_head.weight": hf["lm_head.weight"], "transformer.wte.weight": hf["model.embed_tokens.weight"]}
    for i in range(L):
        there, here = f"model.layers.{i}.", f"transformer.h.{i}."
        q, k, v = (hf[f"{there}self_attn.{x}_proj.weight"] for x in "qkv")
        out[f"{here}norm_1.weight"] = hf[f"{there}input_layernorm.weight"]
        if tiny:
            groups = zip(q.chunk(G), k.chunk(G), v.chunk(G))
            out[f"{here}attn.attn.weight"] = torch.cat([part for group in groups for part in group])
        else:
            out[f"{here}attn.qkv.weight"] = torch.cat([q, k, v])
        out[f"{here}attn.proj.weight"] = hf[f"{there}self_attn.o_proj.weight"]
        out[f"{here}norm_2.weight"] = hf[f"{there}post_attention_layernorm.weight"]
        names = ["swiglu.w1", "swiglu.w2", "swiglu.w3"] if tiny else ["fc_1", "fc_2", "proj"]
        for name, theirs in zip(names, ["gate", "up", "down"]):
            out[f"{here}mlp.{name}.weight"] = hf[f"{there}mlp.{theirs}_proj.weight"]
    out["transformer.ln_f.weight"] = hf["model.norm.weight"]
    return {name: tensor.clone() for name, tensor in out.items()}


def paired(x):
    """Rows of whole heads from halves to neighbours, as Meta's rotary embedding has them."""
    return x.view(-1, 2, D // 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


def meta(hf):
    out = {"tok_embeddings.weight": hf["model.embed_tokens.weight"], "norm.weight": hf["model.norm.weight"],
           "output.weight": hf["lm_head.weight"]}
    for i in range(L):
        there, here = f"model.layers.{i}.", f"layers.{i}."
        out[f"{here}attention.wq.weight"] = paired(hf[f"{there}self_attn.q_proj.weight"])
        out[f"{here}attention.wk.weight"] = paired(hf[f"{there}self_attn.k_proj.weight"])
        out[f"{here}attention.wv.weight"] = hf[f"{there}self_attn.v_proj.weight"]
        out[f"{here}attention.wo.weight"] = hf[f"{there}self_attn.o_proj.weight"]
        out[f"{here}attention_norm.weight"] = hf[f"{there}input_layernorm.weight"]
        out[f"{here}ffn_norm.weight"] = hf[f"{there}post_attention_layernorm.weight"]
        for name, theirs in zip(["w1", "w3", "w2"], ["gate", "up", "down"]):
            out[f"{here}feed_forward.{name}.weight"] = hf[f"{there}mlp.{theirs}_proj.weight"]
    return out


def save(value, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **options)


def lit_config(names):
    norm, mlp = names
    return {
        "name": "small", "block_size": T, "vocab_size": V, "padded_vocab_size": V, "n_layer": L, "n_head": H,
        "n_embd": C, "head_size": D, "n_query_groups": G, "rotary_percentage": 1.0, "parallel_residual": False,
        "bias": False, norm: "RMSNorm", "norm_eps": 1e-5, mlp: "LLaMAMLP", "intermediate_size": F, "rope_base": 10000,
    }


def main():
    llama = model()
    llama.save_pretrained(OUT / "hf")
    (OUT / "hf/generation_config.json").unlink()
    hf = {name: tensor.detach().clone() for name, tensor in llama.state_dict().items()}

    names = sorted(hf)
    shards = [names[: len(names) // 2], names[len(names) // 2:]]
    index = {"metadata": {"total_size": sum(4 * t.numel() for t in hf.values())}, "weight_map": {}}
    for i, shard in enumerate(shards):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        save({name: hf[name] for name in shard}, OUT / "hf-bin" / file)
        index["weight_map"] |= {name: file for name in shard}
    (OUT / "hf-bin/pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))
    (OUT / "hf-bin/config.json").write_bytes((OUT / "hf/config.json").read_bytes())

    save(lit(hf, False), OUT / "litgpt/lit_model.pth")
    text = json.dumps(lit_config(["norm_class_name", "mlp_class_name"]), indent=1)  # JSON is YAML
    (OUT / "litgpt/model_config.yaml").write_text(text)

    moments = {moment: {n: torch.rand_like(t) for n, t in hf.items()} for moment in ["exp_avg", "exp_avg_sq"]}
    save_file({f"{moment}.{n}": t for moment, all in moments.items() for n, t in all.items()},
              OUT / "moments.safetensors")
    weights = lit(hf, True)
    exp_avg, exp_avg_sq = lit(moments["exp_avg"], True), lit(moments["exp_avg_sq"], True)
    hparams = {"model_name": "tiny_LLaMA_small", "global_batch_size": 8, "learning_rate": 4e-4, "decay_lr": True}
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}

    def checkpoint(prefix, key):
        state = {key(i, n): {"step": torch.tensor(3.0), "exp_avg": exp_avg[n], "exp_avg_sq": exp_avg_sq[n]}
                 for i, n in enumerate(weights)}
        return {
            "model": {prefix + name: tensor for name, tensor in weights.items()},
            "optimizer": {"state": state, "param_groups": [group | {"params": list(state)}]},
            "hparams": hparams, "iter_num": 7, "step_count": 3,
        }

    save(checkpoint("", lambda i, n: n), OUT / "tinyllama/iter-000007-ckpt.pth")
    old = {"_use_new_zipfile_serialization": False}
    save(checkpoint("module._orig_mod.", lambda i, n: i), OUT / "lightning/iter-000007-ckpt.pth", **old)
    for folder in ["tinyllama", "lightning"]:
        text = json.dumps(lit_config(["_norm_class", "_mlp_class"]), indent=1)
        (OUT / folder / "lit_config.json").write_text(text)

    columns = ["wo", "w2", "tok_embeddings"]
    for rank in range(2):
        part = {}
        for name, tensor in meta(hf).items():
            leaf = name.split(".")[-2]
            dim = None if "norm" in leaf else 1 if leaf in columns else 0
            part[name] = tensor if dim is None else tensor.chunk(2, dim)[rank].clone()
        save(part | {"rope.freqs": torch.ones(D // 2)}, OUT / f"meta/consolidated.{rank:02}.pth")
    params = {"dim": C, "n_layers": L, "n_heads": H, "n_kv_heads": G, "vocab_size": -1, "norm_eps": 1e-5,
              "max_seq_len": T}
    (OUT / "meta/params.json").write_text(json.dumps(params))

    theirs = meta(hf)
    layers = lambda kind: [theirs[f"layers.{i}.{kind}.weight"] for i in range(L)]  # noqa: E731
    attention = [x for kind in ["wq", "wk", "wv", "wo"] for x in layers(f"attention.{kind}")]
    mlp = [x for kind in ["w1", "w2", "w3"] for x in layers(f"feed_forward.{kind}")]
    embedding, norm, head = (theirs[f"{n}.weight"] for n in ["tok_embeddings", "norm", "output"])
    table = torch.zeros(T, D // 2)
    sizes = [C, F, L, H, G]
    raw = lambda tensors: b"".join(t.numpy().astype("<f4").tobytes() for t in tensors)  # noqa: E731
    version0 = [embedding, *layers("attention_norm"), *attention, *layers("ffn_norm"), *mlp, norm, table, table, head]
    (OUT / "llama2c.bin").write_bytes(struct.pack("<7i", *sizes, -V, T) + raw(version0))
    version1 = [*layers("attention_norm"), *layers("ffn_norm"), norm, embedding, *attention, *mlp, head]
    header = struct.pack("<Ii7iB", 0x616B3432, 1, *sizes, V, T, 0)
    (OUT / "llama2c-v1.bin").write_bytes(header.ljust(256, b"\0") + raw(version1))


main()
