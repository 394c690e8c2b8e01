"""ctypes mirror of csrc/decode/decode.h, packers of quantised weights, a reference model."""
import ctypes as C, os, math, torch
here = os.path.dirname(os.path.abspath(__file__))
lib = C.CDLL(os.environ.get("DECODE_LIB", os.path.join(here, "libdecode.so")))
lib.tl_workspace.restype = C.c_int64
P, I, L, F32, BOOL = C.c_void_p, C.c_int, C.c_int64, C.c_float, C.c_bool
def struct(name, *fields): return type(name, (C.Structure,), {"_fields_": [(n, t) for t, ns in fields for n in ns.split()]})
Weight = C.c_void_p
KvCache = struct("KvCache", (P, "k v k_scale v_scale"), (L, "block_stride"), (I, "token_stride head_stride block_size"), (P, "table"), (I, "max_blocks"))
Rotary = struct("Rotary", (P, "cos sin"), (I, "n stride"))
Gemv = struct("Gemv", (I, "type format group rows out inn"), (Weight, "weight"), (P, "x norm"), (F32, "eps"), (I, "store"), (P, "y"), (L, "y_stride"), (BOOL, "overlap"))
PagedAttention = struct("PagedAttention", (I, "type"), (BOOL, "int8_cache"), (I, "sequences heads groups head_size"), (F32, "scale"), (P, "qkv"), (KvCache, "cache"), (P, "positions"), (BOOL, "append"), (Rotary, "rotary"), (P, "out"), (I, "splits"), (P, "partial lse arrived"), (BOOL, "overlap"))
RopeCache = struct("RopeCache", (I, "type"), (BOOL, "int8_cache"), (L, "tokens"), (I, "heads groups head_size"), (P, "qkv positions sequences"), (KvCache, "cache"), (Rotary, "rotary"))
DecodeLayer = struct("DecodeLayer", (P, "norm_1 norm_2"), (Weight, "qkv proj gate_up mlp_proj"), (P, "k v k_scale v_scale"))
DecodeStep = struct("DecodeStep", (I, "type format group"), (BOOL, "int8_cache"), (I, "rows layers width heads groups head_size mlp_width vocab"), (F32, "eps scale"), (P, "layer norm"), (Weight, "head"), (KvCache, "cache"), (Rotary, "rotary"), (P, "positions x logits"), (L, "logits_stride"), (P, "workspace"))
Sample = struct("Sample", (I, "type sequences vocab"), (P, "logits"), (L, "logits_stride"), (P, "temperature top_k top_p repetition_penalty seen key count positions next log_prob ids"), (I, "ids_stride"), (P, "log_probs not_finite embedding x"), (I, "width"), (BOOL, "overlap"))
Embed = struct("Embed", (L, "tokens"), (I, "width"), (P, "ids embedding x"))
Dequantize = struct("Dequantize", (I, "type format group rows columns"), (Weight, "weight"), (P, "y"))
RmsNorm = struct("RmsNorm", (I, "type"), (L, "rows"), (I, "columns"), (F32, "eps"), (P, "x residual sum weight y rstd slot"))
SwiGlu = struct("SwiGlu", (I, "type"), (L, "rows width"), (P, "gate_up act dact dgate_up"))
for i, s in enumerate((Gemv, PagedAttention, RopeCache, DecodeStep, Sample, Embed, Dequantize, RmsNorm, SwiGlu, DecodeLayer)):
    assert C.sizeof(s) == lib.tl_sizes(i), (s, C.sizeof(s), lib.tl_sizes(i))
FP32, BF16, FP16 = 0, 1, 2
PLAIN, INT8, INT4 = 0, 1, 2
S_PLAIN, S_FP32, S_ADD, S_SWIGLU = 0, 1, 2, 3
TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
keep = []
def ptr(t): return None if t is None else t.data_ptr()
def call(name, p):
    rc = getattr(lib, "tl_" + name)(C.byref(p), C.c_void_p(torch.cuda.current_stream().cuda_stream))
    assert rc == 0, f"{name}: cuda error {rc}"
def pad_columns(t, m, dim=1):
    k = t.shape[dim]; p = (k + m - 1) // m * m - k
    return t if p == 0 else torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1 - dim) + (0, p))

def blocks(q):
    """(N, K) -> (N/8, K/128, 8 g, 4 j, 4 t, 8 e), zeros at the edges"""
    q = pad_columns(pad_columns(q, 128), 8, 0); n, k = q.shape
    return q.view(n // 8, 8, k // 128, 4, 4, 8).transpose(1, 2)
def scale_blocks(s, group, k):
    """(N, groups, ..) -> (N/8, K/128, 8, 128/group, ..) as bytes (N/8, K/128, bytes)"""
    per = 128 // group; s = pad_columns(pad_columns(s, per), 8, 0)
    s = s.view(s.shape[0] // 8, 8, s.shape[1] // per, per, *s.shape[2:]).transpose(1, 2).contiguous()
    return s.flatten(2).contiguous().view(torch.uint8)
def pack_int4(w, group):
    """(N, K) -> bytes (N/8, K/128, 512 + 8 * 128/group * 4), and the weights they stand for (fp32)."""
    n, k = w.shape
    g = pad_columns(w.float(), group).view(n, -1, group)
    low, high = g.amin(-1), g.amax(-1)
    scale, low = ((high - low) / 15).clamp(min=1e-7).half(), low.half()
    q = ((g - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    back = (q * scale.float()[..., None] + low.float()[..., None]).view(n, -1)[:, :k].contiguous()
    b = blocks(q.view(n, -1)[:, :k].to(torch.uint8)).transpose(3, 4)[..., [0, 2, 4, 6, 1, 3, 5, 7]]    # .., 8 g, 4 t, 4 j, nibble
    b = b.reshape(*b.shape[:2], 512, 2)
    return torch.cat((b[..., 0] | b[..., 1] << 4, scale_blocks(torch.stack((scale, low), -1), group, k)), -1).contiguous(), back
def pack_int8(w, group):
    n, k = w.shape
    g = pad_columns(w.float(), group).view(n, -1, group)
    scale = (g.abs().amax(-1) / 127).clamp(min=1e-7).half()
    q = (g / scale.float()[..., None]).round().clamp(-127, 127)
    back = (q * scale.float()[..., None]).view(n, -1)[:, :k].contiguous()
    b = blocks(q.view(n, -1)[:, :k].to(torch.int8))[..., [0, 2, 1, 3, 4, 6, 5, 7]]                    # .., 8 g, 4 j, 4 t, byte
    b = b.view(*b.shape[:3], 2, 2, 4, 8).permute(0, 1, 3, 2, 5, 4, 6)                                 # .., j / 2, g, t, j % 2, byte
    return torch.cat((b.reshape(*b.shape[:2], 1024).contiguous().view(torch.uint8), scale_blocks(scale, group, k)), -1).contiguous(), back

def pack(w, fmt, group):
    """-> (pointer, fp32 weights)"""
    if fmt == PLAIN: keep.append(w); return ptr(w), w.float()
    data, back = (pack_int4 if fmt == INT4 else pack_int8)(w, group)
    keep.append(data); return ptr(data), back

class Cache:
    """Paged cache of one or several layers; layout 'tg' = (blocks, token, G, D) or 'gt' = (blocks, G, token, D)."""
    def __init__(s, B, G, D, length, dt=torch.bfloat16, block=16, int8=False, layout="tg", layers=1, dev="cuda", shuffle=True):
        s.B, s.G, s.D, s.block, s.int8, s.layout = B, G, D, block, int8, layout
        s.max_blocks = (length + block - 1) // block; n = B * s.max_blocks
        shape = (layers, n, block, G, D) if layout == "tg" else (layers, n, G, block, D)
        s.k = torch.zeros(shape, dtype=torch.int8 if int8 else dt, device=dev); s.v = torch.zeros_like(s.k)
        s.ks = torch.zeros(shape[:-1], device=dev) if int8 else None; s.vs = torch.zeros(shape[:-1], device=dev) if int8 else None
        s.table = (torch.randperm(n, device=dev) if shuffle else torch.arange(n, device=dev)).int().view(B, s.max_blocks).contiguous()
    def c(s, layer=0):
        ts, hs = (s.G * s.D, s.D) if s.layout == "tg" else (s.D, s.block * s.D)
        return KvCache(ptr(s.k[layer]), ptr(s.v[layer]), ptr(s.ks[layer]) if s.int8 else None, ptr(s.vs[layer]) if s.int8 else None, s.block * s.G * s.D, ts, hs, s.block, ptr(s.table), s.max_blocks)
    def read(s, b, n, layer=0):
        """-> k, v (n, G, D) fp32"""
        out = []
        for x, sc in ((s.k, s.ks), (s.v, s.vs)):
            y = x[layer][s.table[b].long()].float()
            if s.int8: y = y * sc[layer][s.table[b].long()][..., None]
            if s.layout == "gt": y = y.transpose(1, 2)
            out.append(y.reshape(-1, s.G, s.D)[:n])
        return out

class Rope:
    def __init__(s, n, length=4096, dev="cuda", theta=10000.0):
        f = torch.outer(torch.arange(length, device=dev).float(), 1 / (theta ** (torch.arange(0, n, 2, device=dev).float() / n)))
        s.cos, s.sin, s.n = f.cos().contiguous(), f.sin().contiguous(), n
    def c(s): return Rotary(ptr(s.cos), ptr(s.sin), s.n, s.n // 2)
    def turn(s, x, pos):
        """x (T, heads, D) fp32, pos (T,)"""
        h = s.n // 2; a, b, rest = x[..., :h], x[..., h:2 * h], x[..., 2 * h:]; c, d = s.cos[pos.long()][:, None, :h], s.sin[pos.long()][:, None, :h]
        return torch.cat((a * c - b * d, b * c + a * d, rest), -1)

def rel(a, b): return ((a.float() - b.float()).norm() / b.float().norm()).item()

class Model:
    """Random weights, packed as `fmt`; `ref` is the fp32 forward pass over the dequantised weights."""
    def __init__(s, layers=22, C_=2048, H=32, G=4, D=64, Fw=5632, V=32000, fmt=PLAIN, group=128, dt=torch.bfloat16, n=None, seed=0, scale_embedding=0.02, tie=False, dev="cuda", with_ref=True):
        s.layers, s.C, s.H, s.G, s.D, s.F, s.V, s.fmt, s.group, s.dt, s.dev = layers, C_, H, G, D, Fw, V, fmt, group, dt, dev
        gen = torch.Generator(device=dev).manual_seed(seed); r = lambda *sh, std=0.02: (torch.randn(*sh, device=dev, generator=gen) * std).to(dt)
        s.wte = r(V, C_, std=scale_embedding); s.rope = Rope(n or D); s.W, s.R = {}, {}
        for l in range(layers):
            for name, sh in (("qkv", ((H + 2 * G) * D, C_)), ("proj", (C_, H * D)), ("gate_up", (2 * Fw, C_)), ("mlp_proj", (C_, Fw))): s.add((name, l), r(*sh), with_ref)
            for name in ("norm_1", "norm_2"): s.W[name, l] = (torch.rand(C_, device=dev, generator=gen) + 0.5).to(dt)
        s.norm = (torch.rand(C_, device=dev, generator=gen) + 0.5).to(dt)
        if tie: s.perm = torch.randperm(V, device=dev, generator=gen); head = torch.empty_like(s.wte); head[s.perm] = s.wte; s.norm.fill_(1); head = head.float().div(scale_embedding).mul(0.2).to(dt)
        else: head = r(V, C_)
        s.add(("head", 0), head, with_ref); s.raw_head = head
    def add(s, key, w, with_ref):
        s.W[key], ref = pack(w, s.fmt, s.group)
        if s.fmt == PLAIN: s.R[key] = w
        elif with_ref: s.R[key] = ref.to(torch.float32)
    def bytes(s): 
        per = {PLAIN: 2.0, INT8: 1 + 2 / s.group, INT4: 0.5 + 4 / s.group}[s.fmt]
        return per * (s.layers * s.C * ((s.H + 2 * s.G) * s.D + s.H * s.D + 3 * s.F) + s.V * s.C)
    @torch.no_grad()
    def ref(s, ids):
        """(T,) -> (T, V) fp32"""
        T = len(ids); pos = torch.arange(T, device=s.dev); nm = lambda x, g: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * g.float()
        x = s.wte[ids.long()].float()
        for l in range(s.layers):
            q = (nm(x, s.W["norm_1", l]) @ s.R["qkv", l].float().t()).view(T, -1, s.D)
            a, v = s.rope.turn(q[:, :s.H + s.G], pos), q[:, s.H + s.G:]
            k = a[:, s.H:].repeat_interleave(s.H // s.G, 1); v = v.repeat_interleave(s.H // s.G, 1)
            y = torch.nn.functional.scaled_dot_product_attention(a[:, :s.H].transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True)
            x = x + y.transpose(0, 1).reshape(T, -1) @ s.R["proj", l].float().t()
            g, u = (nm(x, s.W["norm_2", l]) @ s.R["gate_up", l].float().t()).chunk(2, -1)
            x = x + (torch.nn.functional.silu(g) * u) @ s.R["mlp_proj", l].float().t()
        return nm(x, s.norm) @ s.R["head", 0].float().t()

class Sampling:
    """State of `sample` for B sequences."""
    def __init__(s, B, V, stride=2048, dev="cuda", temperature=0.0, top_k=0, top_p=1.0, penalty=1.0, seeds=None):
        f = lambda v, t=torch.float32: torch.full((B,), v, dtype=t, device=dev)
        s.B, s.V, s.stride = B, V, stride
        s.temperature, s.top_k, s.top_p, s.penalty = f(float(temperature)), f(int(top_k), torch.int32), f(float(top_p)), f(float(penalty))
        s.seen = torch.zeros(B, (V + 31) // 32, dtype=torch.int32, device=dev); s.key = torch.tensor([key_of(x) for x in (seeds or range(B))], dtype=torch.int64)
        s.key = torch.where(s.key >= 2**31, s.key - 2**32, s.key).to(torch.int32).to(dev)
        s.count, s.positions, s.next, s.not_finite = (f(0, torch.int32) for _ in range(4)); s.log_prob = f(0.0)
        s.ids = torch.zeros(B, stride, dtype=torch.int32, device=dev); s.log_probs = torch.zeros(B, stride, device=dev)
    def c(s, logits, embedding=None, x=None, overlap=False):
        return Sample(TYPE[logits.dtype], s.B, s.V, ptr(logits), logits.stride(0), ptr(s.temperature), ptr(s.top_k), ptr(s.top_p), ptr(s.penalty), ptr(s.seen), ptr(s.key), ptr(s.count), ptr(s.positions), ptr(s.next), ptr(s.log_prob), ptr(s.ids), s.stride, ptr(s.log_probs), ptr(s.not_finite), ptr(embedding), ptr(x), 0 if x is None else x.shape[-1], overlap)

def key_of(seed):
    """rand_core's seed_from_u64: PCG32 words."""
    out, M = [], 2**64 - 1
    for _ in range(8):
        seed = (seed * 6364136223846793005 + 11634580027462260723) & M
        x = (((seed >> 18) ^ seed) >> 27) & 0xffffffff; r = seed >> 59
        out.append(((x >> r) | (x << (32 - r))) & 0xffffffff)
    return out
def chacha8(key, t):
    s = [0x61707865, 0x3320646e, 0x79622d32, 0x6b206574] + list(key) + [t // 8, 0, 0, 0]; x = list(s); m = 0xffffffff
    def q(a, b, c, d):
        for (p, o, r, n) in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[o]) & m; y = x[r] ^ x[p]; x[r] = ((y << n) | (y >> (32 - n))) & m
    for _ in range(4):
        for i in range(4): q(i, 4 + i, 8 + i, 12 + i)
        for i in range(4): q(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    w = [(a + b) & m for a, b in zip(x, s)]; i = 2 * (t % 8)
    return w[i] | w[i + 1] << 32
