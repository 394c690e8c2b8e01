"""Peers of `tinyllama bench decode`, on TinyLlama-1.1B's sizes with random weights; one JSON object a line.

    decode.py torch BATCH PROMPT NEW         plain PyTorch in bf16 on the GPU: static cache, torch.compile, a CUDA graph a step
    decode.py transformers BATCH PROMPT NEW  transformers' generate in bf16 on the GPU, static cache
    decode.py llama.cpp FILE PROMPT NEW      llama-cpp-python on the CPU, two threads or THREADS
    decode.py gguf FILE                      writes such a model in Q4_0 (needs gguf and llama-cpp-python)
"""

import json
import os
import statistics
import sys
import time

LAYERS, WIDTH, MLP, VOCAB, HEADS, GROUPS, SIZE = 22, 2048, 5632, 32000, 32, 4, 64


def report(peer, batch, prompt, new, prefill, decode):
    """Seconds until every sequence has its first token, and of the NEW - 1 tokens after it: medians."""
    print(json.dumps({
        "peer": peer, "sequences": batch, "prompt_tokens": prompt, "new_tokens": new,
        "prefill_tokens_per_sec": batch * prompt / prefill,
        "decode_tokens_per_sec": batch * (new - 1) / decode,
        "tokens_per_sec": batch * new / (prefill + decode),
    }), flush=True)


def plain_torch(batch, prompt, new, repeats=3):
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}

    def matrix(rows, columns):
        return torch.randn(rows, columns, **options) / 50

    layers = [
        (matrix((HEADS + 2 * GROUPS) * SIZE, WIDTH), matrix(WIDTH, WIDTH), matrix(2 * MLP, WIDTH), matrix(WIDTH, MLP))
        for _ in range(LAYERS)
    ]
    embedding, head = matrix(VOCAB, WIDTH), matrix(VOCAB, WIDTH)
    ones = torch.ones(WIDTH, **options)
    longest = (prompt + new + 63) // 64 * 64
    cache = torch.zeros(LAYERS, 2, batch, GROUPS, longest, SIZE, **options)
    angles = torch.outer(torch.arange(longest).float(), 10000 ** (-torch.arange(0, SIZE, 2).float() / SIZE))
    cos, sin = (torch.cat((x, x), -1).to("cuda") for x in (angles.cos(), angles.sin()))  # (longest, D)
    places = torch.arange(longest, device="cuda")

    def turn(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    def step(ids, positions):  # (B, T), (T,) -> (B,) the most likely next ids
        b, t = ids.shape
        x = embedding[ids]
        mask = places[None, :] <= positions[:, None]  # (T, longest)
        for i, (qkv, proj, gate_up, down) in enumerate(layers):
            q, k, v = (F.rms_norm(x, (WIDTH,), ones, 1e-5) @ qkv.t()).view(b, t, -1, SIZE).transpose(1, 2).split(
                (HEADS, GROUPS, GROUPS), 1)
            q, k = turn(q, cos[positions], sin[positions]), turn(k, cos[positions], sin[positions])
            cache[i, 0].index_copy_(2, positions, k)
            cache[i, 1].index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(q, cache[i, 0], cache[i, 1], mask, enable_gqa=True)
            x = x + y.transpose(1, 2).reshape(b, t, WIDTH) @ proj.t()
            gate, up = (F.rms_norm(x, (WIDTH,), ones, 1e-5) @ gate_up.t()).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ down.t()
        logits = F.rms_norm(x[:, -1], (WIDTH,), ones, 1e-5) @ head.t()
        return logits.argmax(-1)

    # One step as a CUDA graph: the ids it reads are those that it wrote before.
    fast = torch.compile(step, fullgraph=True)
    ids = torch.randint(VOCAB, (batch, prompt), device="cuda")
    last, position = ids[:, -1:].clone(), torch.full((1,), prompt, device="cuda")
    times = []
    with torch.no_grad():

        def advance():
            last.copy_(fast(last, position)[:, None])
            position.add_(1)

        for _ in range(3):
            advance()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            if batch == 1:  # the plain mask of a large batch does not fit: those are timed in decoding alone
                last.copy_(step(ids, places[:prompt])[:, None])
            torch.cuda.synchronize()
            first = time.perf_counter()
            position.fill_(prompt)
            for _ in range(new - 1):
                graph.replay()
            torch.cuda.synchronize()
            times.append((first - start, time.perf_counter() - first))
    prefill, decode = (statistics.median(column) for column in zip(*times))
    report("PyTorch, torch.compile, CUDA graphs", batch, prompt, new, prefill, decode)


def transformers(batch, prompt, new, repeats=3):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCAB, max_position_embeddings=2048)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(3, VOCAB, (batch, prompt), device="cuda")
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": "static"}
    times = []
    for _ in range(repeats + 1):
        seconds = []
        for tokens in (1, new):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        times.append((seconds[0], seconds[1] - seconds[0]))
    prefill, decode = (statistics.median(column) for column in zip(*times[1:]))
    report("transformers, static cache", batch, prompt, new, prefill, decode)


def llama_cpp(file, prompt, new, repeats=3):
    import random

    from llama_cpp import Llama

    threads = int(os.environ.get("THREADS", 2))
    model = Llama(file, n_ctx=prompt + new, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    times = []
    for _ in range(repeats + 1):
        model.reset()
        ids = [random.randrange(3, VOCAB) for _ in range(prompt + new)]
        start = time.perf_counter()
        model.eval(ids[:prompt])
        first = time.perf_counter()
        for token in ids[prompt:prompt + new - 1]:
            model.eval([token])
        times.append((first - start, time.perf_counter() - first))
    prefill, decode = (statistics.median(column) for column in zip(*times[1:]))
    report(f"llama.cpp, {threads} threads", 1, prompt, new, prefill, decode)


def write_gguf(file):
    import ctypes

    import gguf
    import llama_cpp
    import numpy as np

    random = np.random.default_rng(0)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns), dtype=np.float32) / 50).astype(np.float16)

    half = file + ".f16"
    writer = gguf.GGUFWriter(half, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    control = [b"<unk>", b"<s>", b"</s>"]
    writer.add_token_list(control + [b"<0x%02X>" % i for i in range(256)] + [b"t%d" % i for i in range(VOCAB - 259)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    ones = np.ones(WIDTH, np.float32)
    writer.add_tensor("token_embd.weight", matrix(VOCAB, WIDTH))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", matrix(VOCAB, WIDTH))
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (GROUPS * SIZE, WIDTH), "attn_v": (GROUPS * SIZE, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.pure = True
    if llama_cpp.llama_model_quantize(half.encode(), file.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantise {half}")
    os.remove(half)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["torch", *numbers] if len(numbers) == 3:
            plain_torch(*map(int, numbers))
        case ["transformers", *numbers] if len(numbers) == 3:
            transformers(*map(int, numbers))
        case ["llama.cpp", file, prompt, new]:
            llama_cpp(file, int(prompt), int(new))
        case ["gguf", file]:
            write_gguf(file)
        case _:
            sys.exit(__doc__)
