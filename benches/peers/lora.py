"""Peer of `tinyllama finetune` with LoRA: transformers and PEFT as their Trainer uses them (bf16 base, autocast, SDPA, fused
AdamW), on TinyLlama-1.1B's sizes with random weights.

    lora.py base DIR                 writes such a model
    lora.py rows FILE N              writes N conversations of some 900 tokens each
    lora.py train DIR B T STEPS all|qv   one JSON object: tokens a second (median), peak GiB
"""

import json
import random
import statistics
import sys
import time


def base(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def rows(file, n):
    rng = random.Random(0)
    words = "the state of union is strong and people american congress year work".split()
    with open(file, "w") as out:
        for _ in range(n):
            said = [" ".join(rng.choices(words, k=size)) for size in (60, rng.randint(300, 600))]
            out.write(json.dumps({"text": f"### Human: {said[0]}### Assistant: {said[1]}"}) + "\n")


def train(folder, batch, length, steps, which):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    model.config.use_cache = False
    targets = "all-linear" if which == "all" else ["q_proj", "v_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    ids = torch.randint(0, 32000, (batch, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate = batch * length / statistics.median(times[5:])
    print(json.dumps({"peer": "transformers + PEFT", "targets": which, "batch": batch, "tokens": length,
                      "tokens_per_sec": rate, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "base":
        base(sys.argv[2])
    elif sys.argv[1] == "rows":
        rows(sys.argv[2], int(sys.argv[3]))
    else:
        train(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
