"""Twenty steps of LoRA by PEFT and torch.optim.AdamW on a tiny Llama: tests/golden/lora/.

    base/            the model
    start/, end/     adapters before and after, as PEFT saves them (of the end: fp32)
    steps.json       tokens, targets, losses; logits of the end on the first batch
    dpo/, dpo.json   preferences under the end's adapters, the model without them as reference: the gradients in the adapters'
                     places; tokens, targets, margins and loss (the mean over pairs)

torch 2.11, transformers 5, peft 0.21: python scripts/golden/lora.py
"""

import json
import os
import shutil

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

OUT = "tests/golden/lora"
torch.manual_seed(11)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
)
shutil.rmtree(OUT, ignore_errors=True)
base = LlamaForCausalLM(config).float()
for p in base.parameters():  # larger than the initialisation, so that the loss depends on every part
    if p.dim() == 2:
        p.data.mul_(4)
base.save_pretrained(f"{OUT}/base")

targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
model = get_peft_model(base, lora)
for name, p in model.named_parameters():
    if "lora_B" in name:  # as after some steps, so that A has a gradient from the first one on
        p.data.normal_(std=0.05)
model.peft_config["default"].base_model_name_or_path = "../base"
model.save_pretrained(f"{OUT}/start")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, betas=(0.9, 0.999), weight_decay=0.0)
steps = []
for _ in range(20):
    ids = torch.randint(0, 61, (2, 13))
    target = ids[:, 1:].clone()
    target[torch.rand(target.shape) < 0.4] = -100
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    steps.append({"input": ids[:, :-1].tolist(), "target": target.tolist(), "loss": loss.item()})
model.save_pretrained(f"{OUT}/end")
with torch.no_grad():
    logits = model(input_ids=torch.tensor(steps[0]["input"])).logits
with open(f"{OUT}/steps.json", "w") as out:
    json.dump({"steps": steps, "logits": logits.flatten().tolist()}, out, separators=(",", ":"))

# Direct preference optimisation (arXiv 2305.18290), in plain PyTorch. Rows: chosen, rejected, chosen, ..
BETA = 0.3
ids = torch.randint(0, 61, (6, 11))
target = ids[:, 1:].clone()
target[:, :4] = -100
target[1, 7:] = -100


def leads():
    logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    own = logprobs.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (target != -100)
    sums = own.sum(-1).view(-1, 2)
    return sums[:, 0] - sums[:, 1]


with torch.no_grad(), model.disable_adapter():
    reference = leads()
margins = BETA * (leads() - reference)
loss = -torch.nn.functional.logsigmoid(margins).mean()
optimizer.zero_grad()
loss.backward()
for p in model.parameters():
    if p.requires_grad:
        p.data = p.grad.clone()
model.save_pretrained(f"{OUT}/dpo")
with open(f"{OUT}/dpo.json", "w") as out:
    json.dump({"beta": BETA, "input": ids[:, :-1].tolist(), "target": target.tolist(), "margins": margins.tolist(), "loss": loss.item()}, out)
for folder in ("start", "end", "dpo"):
    path = f"{OUT}/{folder}/README.md"
    os.path.exists(path) and os.remove(path)
