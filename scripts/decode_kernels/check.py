"""Correctness of each decode kernel and of the whole step against torch in fp32.

./build.sh && python3 check.py [gemv attention sample step small]     (`small`: for compute-sanitizer)
"""
import os, sys, torch, math, time
from kernels import *
torch.backends.cuda.matmul.allow_tf32 = False; torch.manual_seed(1)
dev = "cuda"; fails = 0
def say(ok, *a):
    global fails; fails += not ok; print("ok  " if ok else "FAIL", *a, flush=True)
def rnd(*s, dt=torch.bfloat16, std=1.0): return (torch.randn(*s, device=dev) * std).to(dt)

def check_gemv():
    worst = {}
    for dt in (torch.bfloat16, torch.float16):
        for fmt, groups in ((PLAIN, (128,)), (INT8, (32, 64, 128)), (INT4, (32, 64, 128))):
            for group in groups:
                for (N, K) in ((2560, 2048), (2048, 5632), (11264, 2048), (1000, 576), (72, 64), (32003, 2048), (4096, 4160)):
                    if N > 20000 and (dt == torch.float16 or group != 128): continue
                    w = rnd(N, K, dt=dt, std=0.05); W, ref = pack(w, fmt, group)
                    if fmt != PLAIN and K <= 2048:
                        y = torch.full((N, K), float("nan"), dtype=dt, device=dev); call("dequantize", Dequantize(TYPE[dt], fmt, group, N, K, W, ptr(y)))
                        if not torch.equal(y, ref.to(dt)) and rel(y, ref) > 3e-3: say(False, "dequantize", fmt, group, N, K, rel(y, ref))
                    for rows in (1, 2, 3, 4, 8):
                        x = rnd(rows, K, dt=dt, std=2); g = (torch.rand(K, device=dev) + 0.5).to(dt)
                        for store in range(4):
                            if store == S_SWIGLU and N % 16: continue
                            for norm in (False, True):
                                if rows in (3, 4) and (store or norm): continue
                                h = x.float()
                                if norm: h = (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-5) * g.float()).to(dt).float()
                                y = h @ ref.t()
                                if store == S_SWIGLU: a, b = y.chunk(2, -1); y = torch.nn.functional.silu(a) * b
                                width = y.shape[1]; out = torch.full((rows, width), float("nan"), device=dev, dtype=torch.float32 if store == S_FP32 else dt)
                                if store == S_ADD: out.copy_(rnd(rows, width, dt=dt)); y = y + out.float()
                                call("gemv", Gemv(TYPE[dt], fmt, group, rows, N, K, W, ptr(x), ptr(g) if norm else None, 1e-5, store, ptr(out), width, False))
                                e = rel(out, y); key = (str(dt)[6:], fmt, group, store); worst[key] = max(worst.get(key, 0), e if e == e else 9)
                                if not e < 8e-3: say(False, "gemv", dt, "fmt", fmt, group, "N", N, "K", K, "rows", rows, "store", store, "norm", norm, e)
                    keep.clear()
    print({k: f"{v:.1e}" for k, v in worst.items()}); say(max(worst.values()) < 8e-3, "gemv worst", max(worst.values()))

def attention_ref(q, k, v, scale):
    """q (H, D), k, v (T, G, D) fp32 -> (H, D)"""
    R = q.shape[0] // k.shape[1]; k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    return torch.einsum("ht,thd->hd", torch.softmax(torch.einsum("hd,thd->ht", q, k) * scale, -1), v)

def check_attention():
    worst = {}
    for dt in (torch.bfloat16, torch.float16):
        for int8 in (False, True):
            for (B, H, G, D, block, layout, n, splits, overlap) in ((3, 32, 4, 64, 16, "tg", 64, 1, 0), (3, 32, 4, 64, 32, "gt", 64, 4, 1), (1, 32, 4, 64, 16, "gt", 64, 16, 1), (5, 8, 8, 128, 16, "tg", 128, 3, 0), (2, 12, 3, 64, 64, "gt", 16, 2, 0),
                                                           (2, 24, 2, 128, 16, "tg", 64, 8, 1), (1, 20, 1, 64, 16, "tg", 32, 1, 0), (300, 32, 4, 64, 16, "gt", 64, 1, 0), (200, 16, 8, 128, 16, "tg", 128, 1, 0)):
                for append in (True, False):
                    T = 700; cache = Cache(B, G, D, T + 1, dt, block, int8, layout, layers=1); rope = Rope(n)
                    pos = torch.randint(0, T, (B,), device=dev, dtype=torch.int32); pos[0] = T - 1
                    if B > 1: pos[1] = 0
                    if B > 2: pos[2] = -1
                    total = int((pos + 1).sum())
                    seqs = torch.repeat_interleave(torch.arange(B, device=dev), (pos + 1).long()).int(); ps = torch.cat([torch.arange(int(p) + 1, device=dev) for p in pos]).int()
                    hist = rnd(total, (H + 2 * G) * D, dt=dt); raw = hist.clone(); last = (torch.cumsum(pos + 1, 0) - 1).long()
                    fill = ps.clone()
                    if append: fill[last[pos >= 0]] = -1   # the newest are written by attention
                    call("rope_cache", RopeCache(TYPE[dt], int8, total, H, G, D, ptr(hist), ptr(fill), ptr(seqs), cache.c(), rope.c()))
                    want = raw.float().view(total, -1, D).clone(); want[:, :H + G] = rope.turn(want[:, :H + G], ps)
                    m = fill >= 0; e = rel(hist.view(total, -1, D)[m], want[m]); 
                    if not e < 4e-3: say(False, "rope", dt, D, n, e)
                    qkv = torch.zeros(B, (H + 2 * G) * D, dtype=dt, device=dev); sel = pos >= 0; qkv[sel] = (raw if append else hist)[last[sel]]
                    out = torch.full((B, H * D), float("nan"), dtype=dt, device=dev); parts = (H // G + 7) // 8
                    part, lse, arr = torch.full((B * splits, H * D), float("nan"), dtype=dt, device=dev), torch.full((B * splits, H), float("nan"), device=dev), torch.zeros(B * G * parts, dtype=torch.int32, device=dev)
                    p = PagedAttention(TYPE[dt], int8, B, H, G, D, D ** -0.5, ptr(qkv), cache.c(), ptr(pos), append, rope.c(), ptr(out), splits, ptr(part), ptr(lse), ptr(arr), bool(overlap))
                    call("paged_attention", p); first = out.clone(); call("paged_attention", p); torch.cuda.synchronize()
                    same = torch.equal(first[sel], out[sel]); ee = 0.0; ec = 0.0
                    for b in list(range(min(B, 5))) + [B - 1]:
                        if pos[b] < 0: say(bool(out[b].isnan().all()), "idle row written") if not out[b].isnan().all() else None; continue
                        o = int(last[b]) - int(pos[b]); w = want[o:o + int(pos[b]) + 1]
                        k, v = cache.read(b, int(pos[b]) + 1); ec = max(ec, rel(k, w[:, H:H + G]), rel(v, w[:, H + G:]))
                        ee = max(ee, rel(out[b], attention_ref(w[-1, :H], k, v, D ** -0.5).reshape(-1)))
                    lim = 8e-3; key = (str(dt)[6:], int8); worst[key] = max(worst.get(key, 0), ee)
                    if not (ee < lim and ec < (1e-2 if int8 else 4e-3) and same and int(arr.abs().sum()) == 0): say(False, "attention", dt, "int8", int8, (B, H, G, D, block, layout, n, splits), "append", append, "err", ee, "cache", ec, "same", same)
    say(max(worst.values()) < 8e-3, "attention worst", worst)

def sample_ref(logits, temperature, top_k, top_p, penalty, seen, u):
    """one row set with the same parameters; logits (B, V) fp32; -> ids, log_probs, (kept)"""
    raw = logits
    if penalty != 1: 
        pt = torch.tensor(penalty, device=dev); logits = torch.where(seen, torch.where(logits > 0, logits / pt, logits * pt), logits)
    lp = torch.log_softmax(raw.double(), -1); V = logits.shape[1]; close = torch.zeros(len(raw), dtype=torch.bool, device=dev)
    if temperature < 1e-6 or top_p == 0: ids = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    else:
        if top_k: kth = logits.topk(min(top_k, V), -1)[0][:, -1:]; logits = logits.masked_fill(logits < kth, -math.inf)
        logits = logits / torch.tensor(temperature, device=dev)
        if top_p < 1:
            srt, order = logits.sort(dim=-1, stable=True); cum = srt.softmax(-1, torch.float64).cumsum(-1); rm = cum <= 1 - float(torch.tensor(top_p)); rm[:, -1] = False
            close |= ((cum - (1 - float(torch.tensor(top_p)))).abs() < 1e-6).any(-1)
            logits = logits.masked_fill(torch.zeros_like(rm).scatter(-1, order, rm), -math.inf)
        pr = logits.softmax(-1, torch.float32).double().cumsum(-1); t = u[:, None] * pr[:, -1:]
        ids = (pr > t).int().argmax(-1); close |= ((pr - t).abs() < 1e-6).any(-1)
    return ids, lp.gather(1, ids[:, None])[:, 0].float(), close

def check_sample():
    total = differ = near = wrong = 0; worst_lp = 0
    draws = {}
    for V, stride, dt, B in ((32000, 32000, torch.float32, 96), (32000, 32000, torch.bfloat16, 96), (1003, 1024, torch.float32, 64), (77, 77, torch.bfloat16, 64), (128256, 128256, torch.bfloat16, 24), (49152, 49152, torch.float32, 24), (32000, 32008, torch.float16, 32)):
        for (temperature, top_k, top_p, penalty) in ((0, 0, 1, 1), (0.8, 50, 1, 1), (1, 0, 1, 1), (0.7, 0, 0.9, 1), (1.3, 40, 0.95, 1.2), (0, 0, 1, 1.5), (1, 1, 1, 1), (0.5, 2000, 0.5, 1.1), (1, 5000, 0.3, 1), (0.9, 30, 0, 1), (2.5, 0, 0.999, 0.8), (1, 0, 0.01, 1)):
            for std in (1.0, 4.0):
                full = torch.empty(B, stride, device=dev).fill_(float("nan")).to(dt); full[:, :V] = (torch.randn(B, V, device=dev) * std).to(dt); lg = full[:, :V].float()
                s = Sampling(B, V, 8, temperature=temperature, top_k=top_k, top_p=top_p, penalty=penalty, seeds=range(1000, 1000 + B))
                start = torch.randint(0, 40, (B,), device=dev, dtype=torch.int32); s.count.copy_(start); s.positions.copy_(start + 5); 
                seen = torch.rand(B, V, device=dev) < 0.1; pad = pad_columns(seen, 32); s.seen.copy_((pad.view(B, -1, 32).long() << torch.arange(32, device=dev)).sum(-1).where((pad.view(B, -1, 32).long() << torch.arange(32, device=dev)).sum(-1) < 2**31, (pad.view(B, -1, 32).long() << torch.arange(32, device=dev)).sum(-1) - 2**32).int()); before = s.seen.clone()
                for i in range(B):
                    k = (1000 + i, int(start[i]))
                    if k not in draws: draws[k] = (chacha8(key_of(k[0]), k[1]) >> 11) / 2**53
                u = torch.tensor([draws[1000 + i, int(start[i])] for i in range(B)], device=dev, dtype=torch.float64)
                emb, x = rnd(V, 64), torch.zeros(B, 64, dtype=torch.bfloat16, device=dev)
                call("sample", s.c(full, emb, x)); ids, lp, close = sample_ref(lg, temperature, top_k, top_p, penalty, seen, u)
                bad = s.next.long() != ids; total += B; differ += int(bad.sum()); near += int((bad & close).sum()); wrong += int((bad & ~close).sum()); good = ~bad
                worst_lp = max(worst_lp, float((s.log_prob - lp)[good].abs().max()) if good.any() else 0)
                one = s.next.long(); bit = torch.where(one % 32 == 31, torch.tensor(-2**31, device=dev), (1 << (one % 32))).int()
                ok = torch.equal(x, emb[one]) and torch.equal(s.count, start + 1) and torch.equal(s.positions, start + 6) and bool((s.ids[torch.arange(B, device=dev), (start % 8).long()] == s.next).all()) and int(s.not_finite.sum()) == 0
                before[torch.arange(B, device=dev), one // 32] |= bit; ok = ok and torch.equal(before, s.seen)
                if not ok or int((bad & ~close).sum()): say(False, "sample", V, dt, (temperature, top_k, top_p, penalty), std, "state ok", ok, "wrong", int((bad & ~close).sum()), "of", B, one[bad & ~close][:3].tolist(), ids[bad & ~close][:3].tolist())
    say(wrong == 0 and worst_lp < 1e-4, f"sample: {total} cases, {differ} differ, of which {near} with a cumulative sum within 1e-6 of a border; log-prob error {worst_lp:.1e}")
    for badv in (float("nan"), float("inf"), -float("inf")):
        lg = torch.randn(4, 32000, device=dev); lg[1, 777] = badv; lg[2] = badv if badv < 0 else lg[2]; s = Sampling(4, 32000, 8, temperature=1.0); s.positions[3] = -1; call("sample", s.c(lg))
        want = [0, 1, 0, 0] if not badv < 0 else [0, 0, 1, 0]; say(s.not_finite.tolist() == want and int(s.count[3]) == 0, "not finite", badv, s.not_finite.tolist())
    torch.manual_seed(3); p = torch.tensor([0.1, 0.2, 0.3, 0.4], device=dev).log(); lg = p.repeat(40000, 1).contiguous(); s = Sampling(40000, 4, 8, temperature=1.0, seeds=range(40000)); call("sample", s.c(lg)); print("frequencies", (torch.bincount(s.next.long()) / 40000).tolist())

def run_step(m, B, ids, int8=False, layout="tg", block=16, start=0):
    """feeds ids (B, T) -> logits (B, T, V)"""
    T = ids.shape[1]; cache = Cache(B, m.G, m.D, T, m.dt, block, int8, layout, layers=m.layers); out = []
    pos = torch.zeros(B, dtype=torch.int32, device=dev); x = torch.zeros(B, m.C, dtype=m.dt, device=dev); logits = torch.full((B, m.V), float("nan"), device=dev)
    st = step_of(m, B, cache, pos, x, logits)
    for t in range(T):
        call("embed", Embed(B, m.C, ptr(ids[:, t].int().contiguous()), ptr(m.wte), ptr(x))); call("decode_step", st[0]); out.append(logits.clone()); pos += 1
    return torch.stack(out, 1)
def step_of(m, B, cache, pos, x, logits, workspace=None):
    layers = (DecodeLayer * m.layers)()
    for l in range(m.layers):
        c = cache.c(l); layers[l] = DecodeLayer(ptr(m.W["norm_1", l]), ptr(m.W["norm_2", l]), m.W["qkv", l], m.W["proj", l], m.W["gate_up", l], m.W["mlp_proj", l], c.k, c.v, c.k_scale, c.v_scale)
    raw = torch.frombuffer(bytearray(bytes(layers)), dtype=torch.uint8).to(dev)
    p = DecodeStep(TYPE[m.dt], m.fmt, m.group, cache.int8, B, m.layers, m.C, m.H, m.G, m.D, m.F, m.V, 1e-5, m.D ** -0.5, ptr(raw), ptr(m.norm), m.W["head", 0], cache.c(0), m.rope.c(), ptr(pos), ptr(x), ptr(logits), logits.stride(0), None)
    ws = torch.zeros(lib.tl_workspace(C.byref(p)), dtype=torch.uint8, device=dev); p.workspace = ptr(ws); return p, (raw, ws, pos, x, logits, cache)

def check_small():
    """one small case of each kernel, for compute-sanitizer"""
    for fmt in (PLAIN, INT8, INT4):
        for N, K, rows, store in ((72, 576, 3, S_PLAIN), (96, 2112, 1, S_SWIGLU), (40, 64, 8, S_ADD), (70000, 64, 1, S_FP32)):
            W, ref = pack(rnd(N, K, std=0.05), fmt, 64); x = rnd(rows, K); g = rnd(K); y = rnd(rows, N // 2 if store == S_SWIGLU else N, dt=torch.float32 if store == S_FP32 else torch.bfloat16)
            for ov in (False, True): call("gemv", Gemv(BF16, fmt, 64, rows, N, K, W, ptr(x), ptr(g) if store else None, 1e-5, store, ptr(y), y.shape[1], ov))
            if fmt: z = torch.empty(N, K, dtype=torch.bfloat16, device=dev); call("dequantize", Dequantize(BF16, fmt, 64, N, K, W, ptr(z)))
    for B, H, G, D, int8, splits in ((2, 8, 1, 64, False, 3), (3, 4, 2, 128, True, 1), (700, 4, 2, 64, False, 1), (400, 4, 2, 64, True, 1)):
        T = 70; cache = Cache(B, G, D, T, block=16, int8=int8, layout="gt"); rope = Rope(D); pos = torch.randint(-1, T, (B,), device=dev, dtype=torch.int32); qkv = rnd(B, (H + 2 * G) * D); out = rnd(B, H * D); parts = (H // G + 7) // 8
        part, lse, arr = rnd(B * splits, H * D), torch.zeros(B * splits, H, device=dev), torch.zeros(B * G * parts, dtype=torch.int32, device=dev)
        call("rope_cache", RopeCache(BF16, int8, B, H, G, D, ptr(qkv), ptr(pos), None, cache.c(), rope.c()))
        call("paged_attention", PagedAttention(BF16, int8, B, H, G, D, D ** -0.5, ptr(qkv), cache.c(), ptr(pos), True, rope.c(), ptr(out), splits, ptr(part), ptr(lse), ptr(arr), True))
    for V, t, k, p in ((1003, 0, 0, 1), (1003, 0.8, 50, 0.9), (40000, 0.8, 1500, 0.5)):
        s = Sampling(2, V, 8, temperature=t, top_k=k, top_p=p, penalty=1.1); lg = torch.randn(2, V, device=dev).bfloat16().float(); e = rnd(V, 64); x = rnd(2, 64); call("sample", s.c(lg, e, x))
    call("embed", Embed(2, 64, ptr(s.next), ptr(e), ptr(x)))
    for B, fmt, int8, D in ((1, PLAIN, False, 64), (3, INT4, True, 64), (2, INT8, False, 128)):
        m = Model(layers=2, C_=320, H=4, G=2, D=D, Fw=704, V=1003, fmt=fmt, group=64); run_step(m, B, torch.randint(0, m.V, (B, 3), device=dev), int8)
    torch.cuda.synchronize(); say(True, "small")
def check_step():
    cases = [("TinyLlama", dict(), 1, 80, False), ("TinyLlama int4", dict(fmt=INT4), 1, 80, False), ("TinyLlama int8 w+cache", dict(fmt=INT8), 1, 80, True), ("rows 8", dict(layers=4), 8, 70, False), ("rows 5 int4 g32", dict(layers=4, fmt=INT4, group=32), 5, 70, False),
             ("rows 2 fp16", dict(layers=4, dt=torch.float16), 2, 70, False), ("rows 3, D 128, int8 cache", dict(layers=3, C_=3072, H=24, G=8, D=128, Fw=8192, V=49155), 3, 70, True),
             ("SmolLM-like int8 g64", dict(layers=5, C_=576, H=9, G=3, D=64, Fw=1536, V=49152, fmt=INT8, group=64), 1, 70, False), ("MQA, wide C, fp16 int4 g64", dict(layers=2, C_=4096, H=32, G=1, D=128, Fw=11008, V=1000, fmt=INT4, group=64, dt=torch.float16), 4, 40, False), ("MHA small n", dict(layers=2, C_=256, H=4, G=4, D=64, Fw=704, V=500, n=16), 1, 40, False)]
    for name, kw, B, T, int8 in cases:
        m = Model(**kw); ids = torch.randint(0, m.V, (B, T), device=dev); lg = run_step(m, B, ids, int8, "gt" if B % 2 else "tg")
        again = run_step(m, B, ids, int8, "gt" if B % 2 else "tg"); ref = torch.stack([m.ref(ids[b]) for b in range(B)])
        es = [rel(lg[:, t], ref[:, t]) for t in range(T)]; lim = (0.03 if m.dt == torch.bfloat16 else 0.01) + (0.02 if int8 else 0)
        say(max(es) < lim and torch.equal(lg, again), "step", name, f"rows {B}: logits error first {es[0]:.4f} last {es[-1]:.4f} max {max(es):.4f}, same in a second run {torch.equal(lg, again)}"); keep.clear(); del m
    for fmt in (PLAIN, INT4):
        m = Model(fmt=fmt, scale_embedding=4.0, tie=True); T = 70; cache = Cache(1, 4, 64, T + 2, layers=22); s = Sampling(1, m.V); x = m.wte[7:8].clone(); lg = torch.zeros(1, m.V, device=dev); st = step_of(m, 1, cache, s.positions, x, lg); worst = 1e9
        for t in range(T): call("decode_step", st[0]); call("sample", s.c(lg, m.wte, x, True))
        ours = [7] + s.ids[0, :T].tolist(); ref = m.ref(torch.tensor(ours[:-1], device=dev)); top = ref.topk(2, -1); say(top[1][:, 0].tolist() == ours[1:], f"greedy ids equal the fp32 model's for {T} tokens, fmt {fmt}, smallest margin {float((top[0][:,0]-top[0][:,1]).min()):.3f}, distinct ids {len(set(ours))}"); keep.clear()

if __name__ == "__main__":
    for n in sys.argv[1:] or ["gemv", "attention", "sample", "step"]:
        t = time.time(); print("==", n, flush=True)
        try: globals()["check_" + n]()
        except Exception as e: import traceback; traceback.print_exc(); fails += 1
        torch.cuda.synchronize(); print(f"   {time.time() - t:.1f} s", flush=True)
    print("failures", fails)
