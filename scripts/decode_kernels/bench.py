"""Times of the decode kernels: python3 bench.py copy_rate b1 "b1(('step', 'pdl'), rows=(8,))" batch int4_sizes attention_only table"""
import sys, torch, time
from kernels import *
from check import step_of, dev
torch.manual_seed(0)
BW = 4.8e12
def graph_of(f):
    f(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    return g
def timed(f, n=10, reps=5):
    f(); torch.cuda.synchronize(); ts = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); a.record()
        for _ in range(n): f()
        b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b) / n)
    return sorted(ts)[reps // 2]
def copy_rate():
    a = torch.empty(2**31, dtype=torch.uint8, device=dev).random_(); b = torch.empty_like(a); t = timed(lambda: b.copy_(a)); print(f"copy {2 * a.numel() / t / 1e9:.2f} TB/s", flush=True)
    r = timed(lambda: a.view(torch.float32).sum()); print(f"read (torch.sum) {a.numel() / r / 1e9:.2f} TB/s", flush=True)
def per_step(m, B, cache, s, overlap=True):
    """PDL kernels, five a layer"""
    dt = TYPE[m.dt]; e = lambda *sh, t=m.dt: torch.zeros(*sh, dtype=t, device=dev)
    x, qkv, o, act, lg = e(B, m.C), e(B, (m.H + 2 * m.G) * m.D), e(B, m.H * m.D), e(B, m.F), e(B, m.V, t=torch.float32)
    splits = lib.tl_splits(B, m.G, cache.max_blocks * cache.block); parts = (m.H // m.G + 7) // 8
    part, lse, arr = e(B * splits, m.H * m.D), e(B * splits, m.H, t=torch.float32), e(B * m.G * parts, t=torch.int32)
    ps = []
    def gv(out, inn, w, xx, norm, store, y): ps.append(("gemv", Gemv(dt, m.fmt, m.group, B, out, inn, w, ptr(xx), ptr(norm), 1e-5, store, ptr(y), y.shape[1], overlap)))
    for l in range(m.layers):
        gv(qkv.shape[1], m.C, m.W["qkv", l], x, m.W["norm_1", l], S_PLAIN, qkv)
        ps.append(("paged_attention", PagedAttention(dt, cache.int8, B, m.H, m.G, m.D, m.D ** -0.5, ptr(qkv), cache.c(l), ptr(s.positions), True, m.rope.c(), ptr(o), splits, ptr(part), ptr(lse), ptr(arr), overlap)))
        gv(m.C, m.H * m.D, m.W["proj", l], o, None, S_ADD, x)
        gv(2 * m.F, m.C, m.W["gate_up", l], x, m.W["norm_2", l], S_SWIGLU, act)
        gv(m.C, m.F, m.W["mlp_proj", l], act, None, S_ADD, x)
    gv(m.V, m.C, m.W["head", 0], x, m.norm, S_FP32, lg)
    ps.append(("sample", s.c(lg, m.wte, x, overlap))); keep.extend((x, qkv, o, act, lg, part, lse, arr))
    def f():
        for n, p in ps: call(n, p)
    return f, lg, x
def whole(m, B, cache, s, with_sample=True):
    x, lg = torch.zeros(B, m.C, dtype=m.dt, device=dev), torch.zeros(B, m.V, device=dev); st = step_of(m, B, cache, s.positions, x, lg); keep.append(st); sp = s.c(lg, m.wte, x, True)
    def f():
        call("decode_step", st[0])
        if with_sample: call("sample", sp)
    return f, lg, x
def rate(g, s, x, m, start, n):
    s.positions.fill_(start); s.count.zero_(); x.copy_(m.wte[:x.shape[0]])
    for _ in range(3): g.replay()
    best = []
    for _ in range(3):
        s.positions.fill_(start); s.count.zero_(); torch.cuda.synchronize(); a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); a.record()
        for _ in range(n): g.replay()
        b.record(); torch.cuda.synchronize(); best.append(a.elapsed_time(b) / n)
    return sorted(best)[1]
def b1(kinds=("step", "pdl"), fmts=(PLAIN, INT8, INT4), rows=(1,), sampled=False):
    for fmt in fmts:
        m = Model(fmt=fmt, with_ref=False)
        for B in rows:
            cache = Cache(B, m.G, m.D, 1024, layers=m.layers, shuffle=True); cache.k.normal_(); cache.v.normal_()
            for kind in kinds:
                s = Sampling(B, m.V, temperature=0.8 if sampled else 0.0, top_k=50 if sampled else 0)
                f, lg, x = (whole if kind == "step" else per_step)(m, B, cache, s, *([False] if kind == "nopdl" else [])); x.copy_(m.wte[:B]); g = graph_of(f)
                a, b = rate(g, s, x, m, 0, 256), rate(g, s, x, m, 900, 100)
                print(f"fmt {fmt} rows {B} {kind:5s} {'sampled' if sampled else ''}: {B / a * 1e3:7.1f} tok/s ctx 0-256 ({m.bytes() / a / 1e-3 / BW * 100:.1f} % of {BW / 1e12} TB/s; {a * 1e3:.1f} us), {B / b * 1e3:7.1f} at 900-1000 ({a / b:.3f}x) finite {bool(torch.isfinite(lg).all())}", flush=True); del g
        keep.clear(); del m
def table(fmt=PLAIN, pos=200, kind="step", overlap=True):
    m = Model(fmt=fmt, with_ref=False); cache = Cache(1, m.G, m.D, 1024, layers=m.layers); s = Sampling(1, m.V); f, lg, x = (whole if kind == "step" else per_step)(m, 1, cache, s, overlap if kind != "step" else True); x.copy_(m.wte[:1]); s.positions.fill_(pos); g = graph_of(f)
    for _ in range(20): g.replay()
    s.positions.fill_(pos); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as pr:
        for _ in range(10): g.replay()
        torch.cuda.synchronize()
    print("table", fmt, kind, overlap)
    for r in sorted(pr.key_averages(), key=lambda r: -r.self_device_time_total)[:8]: print(f"    {r.key[:90]:90s} {r.count:4d} {r.self_device_time_total / r.count:8.2f} us", flush=True)
    keep.clear()
def stream(mb=2000):
    """rate of the ring alone: a step of one small layer and a huge head"""
    for V in (512000,):
        m = Model(layers=1, V=V, with_ref=False); cache = Cache(1, m.G, m.D, 1024, layers=1); s = Sampling(1, m.V); f, lg, x = whole(m, 1, cache, s, False); x.copy_(m.wte[:1]); t = timed(graph_of(f).replay, 5)
        y = torch.zeros(1, V, device=dev); p = Gemv(BF16, PLAIN, 128, 1, V, m.C, m.W["head", 0], ptr(x), ptr(m.norm), 1e-5, S_FP32, ptr(y), V, False); t2 = timed(lambda: call("gemv", p), 5)
        print(f"stream: step {m.bytes() / t / 1e9:.2f} TB/s, gemv {V * m.C * 2 / t2 / 1e9:.2f} TB/s", flush=True); keep.clear()
class Batch:
    """One decode step of B sequences: cuBLAS for the products, own kernels for the rest."""
    def __init__(s, m, B, length, layout="tg", block=16, int8=False):
        e = lambda *sh, t=m.dt: torch.zeros(*sh, dtype=t, device=dev); s.m, s.B = m, B
        s.cache = Cache(B, m.G, m.D, length, m.dt, block, int8, layout, layers=m.layers); s.s = Sampling(B, m.V)
        s.x, s.h, s.qkv, s.o, s.gu, s.act, s.lg, s.rstd = e(B, m.C), e(B, m.C), e(B, (m.H + 2 * m.G) * m.D), e(B, m.H * m.D), e(B, 2 * m.F), e(B, m.F), e(B, m.V), e(B, t=torch.float32)
        dt = TYPE[m.dt]; s.norms = [RmsNorm(dt, B, m.C, 1e-5, ptr(s.x), None, None, ptr(w), ptr(s.h), ptr(s.rstd), None) for w in [m.W[n, l] for l in range(m.layers) for n in ("norm_1", "norm_2")] + [m.norm]]
        s.att = [PagedAttention(dt, int8, B, m.H, m.G, m.D, m.D ** -0.5, ptr(s.qkv), s.cache.c(l), ptr(s.s.positions), True, m.rope.c(), ptr(s.o), 1, None, None, None, False) for l in range(m.layers)]
        s.sw = SwiGlu(dt, B, m.F, ptr(s.gu), ptr(s.act), None, None); s.sm = s.s.c(s.lg, m.wte, s.x); s.w = lambda n, l: m.R[n, l]
    def step(s):
        m = s.m
        for l in range(m.layers):
            call("rms_norm_forward", s.norms[2 * l]); torch.mm(s.h, m.R["qkv", l].t(), out=s.qkv); call("paged_attention", s.att[l])
            torch.addmm(s.x, s.o, m.R["proj", l].t(), out=s.x); call("rms_norm_forward", s.norms[2 * l + 1]); torch.mm(s.h, m.R["gate_up", l].t(), out=s.gu)
            call("swiglu_forward", s.sw); torch.addmm(s.x, s.act, m.R["mlp_proj", l].t(), out=s.x)
        call("rms_norm_forward", s.norms[-1]); torch.mm(s.h, m.R["head", 0].t(), out=s.lg); call("sample", s.sm)
def batch(sizes=(1000, 256), layouts=("tg", "gt"), sampled=(False, True), table=True):
    m = Model()
    for B in sizes:
        for layout in layouts:
            for samp in sampled if layout == layouts[-1] else (False,):
                b = Batch(m, B, 400, layout); b.cache.k.normal_(); b.cache.v.normal_()
                if samp: b.s.temperature.fill_(0.8); b.s.top_k.fill_(50)
                b.x.copy_(m.wte[torch.randint(0, m.V, (B,), device=dev)]); g = graph_of(b.step); res = {}
                for p in (16, 64, 128, 255, 399):
                    def f(): b.s.positions.fill_(p); g.replay()
                    res[p] = round(timed(f, 4, 3), 3)
                def run(): 
                    b.s.positions.zero_()
                    for _ in range(256): g.replay()
                t = timed(run, 1, 3); print(f"batch {B} {layout} {'sampled' if samp else 'greedy'}: {B * 256 / t * 1e3:.0f} tok/s over 256 tokens; ms at ctx {res}; finite {bool(torch.isfinite(b.lg.float()).all())}", flush=True)
                if table and not samp and layout == layouts[-1]:
                    b.s.positions.fill_(200); torch.cuda.synchronize()
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as pr: g.replay(); torch.cuda.synchronize()
                    for r in sorted(pr.key_averages(), key=lambda r: -r.self_device_time_total)[:9]: print(f"    {r.key[:70]:70s} {r.count:4d} {r.self_device_time_total / 1e3:8.3f} ms", flush=True)
                del b, g
def attention_only(B=1000, length=256, layouts=("tg", "gt"), blocks=(16, 32, 64), D=64, H=32, G=4):
    for int8 in (False, True):
        for layout in layouts:
            for block in blocks:
                L_ = 6; cache = Cache(B, G, D, length + 64, block=block, int8=int8, layout=layout, layers=L_); (cache.k.random_(-100, 100), cache.v.random_(-100, 100), cache.ks.fill_(0.01), cache.vs.fill_(0.01)) if int8 else (cache.k.normal_(), cache.v.normal_())
                rope = Rope(D); pos = torch.full((B,), length - 1, dtype=torch.int32, device=dev); qkv = torch.randn(B, (H + 2 * G) * D, device=dev).bfloat16(); out = torch.zeros(B, H * D, device=dev).bfloat16(); splits = lib.tl_splits(B, G, length)
                part, lse, arr = torch.zeros(B * splits, H * D, device=dev).bfloat16(), torch.zeros(B * splits, H, device=dev), torch.zeros(B * G * ((H // G + 7) // 8), dtype=torch.int32, device=dev)
                ps = [PagedAttention(BF16, int8, B, H, G, D, D ** -0.5, ptr(qkv), cache.c(l), ptr(pos), True, rope.c(), ptr(out), splits, ptr(part), ptr(lse), ptr(arr), False) for l in range(L_)]
                t = timed(graph_of(lambda: [call("paged_attention", p) for p in ps]).replay, 10) / L_; by = B * length * G * D * 2 * (1 if int8 else 2) + (B * length * G * 8 if int8 else 0) + B * (2 * H + 2 * G) * D * 2
                print(f"attention B {B} ctx {length} int8 {int8} {layout} block {block} splits {splits}: {t * 1e3:.1f} us, {by / t / 1e9:.2f} TB/s", flush=True)
def int4_sizes(Ms=(1, 2, 4, 8, 16, 32, 64, 128)):
    """gate|up, (11264, 2048): own gemv, aten, dequantise + cuBLAS, us"""
    n, k, L_ = 11264, 2048, 12
    for M in Ms:
        x = torch.randn(M, k, device=dev).bfloat16(); y = torch.zeros(M, n, dtype=torch.bfloat16, device=dev); ws = [torch.randn(n, k, device=dev).mul_(0.02) for _ in range(L_)]; packed = [pack(w, INT4, 128)[0] for w in ws]; wb = [w.bfloat16() for w in ws]; tmp = torch.empty_like(wb[0]); res = {}
        def own():
            for p in packed:
                for i in range(0, M, 8): call("gemv", Gemv(BF16, INT4, 128, min(8, M - i), n, k, p, x[i:].data_ptr(), None, 1e-5, S_PLAIN, y[i:].data_ptr(), n, False))
        def deq():
            for p in packed: call("dequantize", Dequantize(BF16, INT4, 128, n, k, p, ptr(tmp))); torch.mm(x, tmp.t(), out=y)
        def bf():
            for w in wb: torch.mm(x, w.t(), out=y)
        q = torch.randint(0, 255, (n, k // 2), device=dev, dtype=torch.uint8); wp = [torch.ops.aten._convert_weight_to_int4pack(q, 8) for _ in range(L_)]; sz = torch.randn(k // 128, n, 2, device=dev).bfloat16()
        def aten():
            for w in wp: torch.ops.aten._weight_int4pack_mm(x, w, 128, sz)
        for name, f in (("own gemv", own), ("aten", aten), ("dequantise + cuBLAS", deq), ("bf16 cuBLAS", bf)):
            res[name] = round(timed(graph_of(f).replay, 5) / L_ * 1e3, 1)
        print("M", M, res, flush=True); keep.clear()
if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    for a in sys.argv[1:]: eval(a if "(" in a else a + "()")
