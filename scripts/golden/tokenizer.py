"""Golden values of `tokenizer.model` (SentencePiece BPE).

Trains four small models on the texts below and writes, into tests/golden/tokenizer/:
  llama.model    Llama's settings: identity normaliser, byte fallback, no whitespace clean-up
  rules.model    a normaliser with character rules, white space cleaned up (as OpenLLaMA's)
  loose.model    pieces that span words, no dummy prefix, <unk> instead of byte fallback
  unused.model   llama.model with every ninth piece UNUSED and scores that tie
  unigram.model  a unigram model, to be refused
  goldens.json   {model: {"texts": [...], "ids": [[...]], "decode": [{"ids", "text"}]}}

    python3 -m venv venv && venv/bin/pip install sentencepiece==0.2.3 protobuf==7.36.2
    venv/bin/python scripts/golden/tokenizer.py [OUT_DIR]
"""

import io
import json
import random
import sys
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as pb

VERSION = "0.2.3"
SP = "\u2581"

CORPUS = """
The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times,
it was the age of wisdom, it was the age of foolishness, it was the epoch of belief, it was the
epoch of incredulity, it was the season of Light, it was the season of Darkness.
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and see
the watery part of the world. It is a way I have of driving off the spleen and regulating the
circulation. In 1851 and 1859, 12345 67890 3.14159 2.71828 numbers were written down in the logs.
def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v
for (int i = 0; i < n; i++) { sum += a[i] * b[i]; } return sum; // dot product
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
La souris a \u00e9t\u00e9 mang\u00e9e par le chat, d\u00e9j\u00e0 vu, \u00e0 la fin de l'\u00e9t\u00e9 fran\u00e7ais.
Stra\u00dfe, \u00fcber, \u00e4hnlich, gr\u00f6\u00dfer, M\u00fcnchen, K\u00f6ln und D\u00fcsseldorf.
\u0441\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a
\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u3002\u4eca\u5929\u7684\u5929\u7a7a\u5f88\u84dd\u3002
aaaa aaaaaaaa aaa aa a abababab ababab abab ab banana bananas
"""

TEXTS = [
    "", " ", "  ", "   ", "a", " a", "a ", "  a  ", "the", "the the", " the  the   the ",
    "Hello world", "Hello, world!", "The quick brown fox", "it was the worst of times",
    "\n", "\t", "\r\n", "a\nb", "a\tb", "a\r\nb", "\n\n\n", " \n \n", "tab\t\ttab", "\u00a0nbsp\u00a0",
    "def f(x):\n    return x\n", "        deep indent", "x = 3.14159; y = 12345",
    "caf\u00e9", "cafe\u0301", "\u00e9t\u00e9 \u00e0", "\u00fcber Stra\u00dfe", "\ufb01nance", "\uff28\uff45\uff4c\uff4c\uff4f",
    "\u2460\u2461", "\u1e9b\u0323", "a\u200bb", "\u3000ideographic\u3000space\u3000",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u4f60\u597d\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea flag", "a\U0001f600b \U0001f600 c",
    "\x00", "a\x00b", "\x01\x02\x1f\x7f", "\ufeffbom", "\ufffd", "\U0010ffff", "\ud7ff\ue000",
    SP, SP * 2, "a" + SP + "b", SP + "a", "a" + SP, " " + SP + " ",
    "<s>", "</s>", "<unk>", "a</s>b", " </s> ", "<0x41>", "<0x0A>", "<pad>", "<ctl>",
    "<sep>", "<sep><sep>", "a<sep>b", "a <sep> b", " <sep> ", "<sep> <sep>  <sep>", "<se", "<sep",
    "<|im_end|>", "<|im_end|><sep>", "xy z", "axy zb", "xy  z", "xyx", "xyxyx", "yxyx", "q\u0301q", "aq\u0301\u0301b",
    "aaaaaaaaaaa", "aaaaaaaaaaaa", "abababababa", "bababab", "banananana", "ab" * 50, "a" * 301,
    "no_such_\u0394\u03b5\u03bb\u03c4\u03b1_chars", "\u0394 \u0394\u0394 \u0394", "mixed\u0394the\u0394",
    "https://example.org/?q=1&r=2#frag", "1,234,567.89", "!!!???...", "------------", "a" * 20 + " " * 20 + "b",
]

# Alphabets the random texts draw from: spaces and symbols often, everything else sometimes.
POOLS = [
    list("aabb  "), list("the of was it in "), list("xyz q\u0301<sep>|im_end "), list("\n\t  ab"),
    list("0123456789 .,"), [SP, " ", "a", "the", "<sep>", "xy z"], list("\u4eca\u5929\u6c14\u597d\u4f60\U0001f600\u0394 "),
    ["</s>", "<s>", "<unk>", "<0x41>", "a", " "], [chr(c) for c in range(0x20)] + ["a", " "],
    [chr(c) for c in range(0xA0, 0x250)], ["\uff28", "\ufb01", "e\u0301", "\u2460", " ", "\u3000", "\u200b", "a"],
]

RULES = {
    "\uff28": "H", "\uff45": "e", "\uff4c": "l", "\uff4f": "o", "\ufb01": "fi", "e\u0301": "\u00e9", "\u2460": "1", "\u2461": "2",
    "\u2460\u2461": "12", "\n": " ", "\t": " ", "\u3000": " ", "\u200b": "", "\u00a0": " ", "\x01": "",
    "\u1e9b\u0323": "\u1e69", "\u00df": "ss", "<sep": "SEP",
}


def random_texts(seed):
    rng = random.Random(seed)
    out = []
    for _ in range(100):
        pool = rng.choice(POOLS)
        out.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 40))))
    for _ in range(30):
        pool = sum((rng.choice(POOLS) for _ in range(3)), [])
        out.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 60))))
    return out


def train(rules_file, **options):
    model = io.BytesIO()
    lines = [line for line in CORPUS.strip().split("\n")]
    if rules_file:
        options["normalization_rule_tsv"] = str(rules_file)
    else:
        options["normalization_rule_name"] = "identity"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1,
        user_defined_symbols=["<sep>", "<|im_end|>", "xy z", "q\u0301"], control_symbols=["<ctl>"],
        input_sentence_size=0, shuffle_input_sentence=False, minloglevel=2, **options)
    proto = pb.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # a path on this machine
    return proto.SerializeToString()


def with_unused(data):
    """Every ninth normal piece UNUSED, scores rounded so that several tie."""
    proto = pb.ModelProto()
    proto.ParseFromString(data)
    normal = [p for p in proto.pieces if p.type == pb.ModelProto.SentencePiece.NORMAL]
    for i, piece in enumerate(normal):
        piece.score = float(-(i // 4))
        if i % 9 == 4 and len(piece.piece) > 1:
            piece.type = pb.ModelProto.SentencePiece.UNUSED
    return proto.SerializeToString()


def decodings(sp, texts, seed):
    """Ids of texts, cut anywhere, and ids at random: half characters, controls, leading bytes."""
    rng = random.Random(seed)
    samples = [[]]
    for text in texts[::6]:
        ids = sp.encode(text)
        samples.append(ids[rng.randint(0, 3):])
        samples.append([sp.bos_id()] + ids[: len(ids) // 2] + [sp.eos_id()])
    for _ in range(60):
        samples.append([rng.randrange(sp.vocab_size()) for _ in range(rng.randint(1, 12))])
    if sp.piece_to_id("<0xE4>") != sp.unk_id():
        for data in [b"\xe4\xbd", b"\xe4\xbda", b"\xf0\x9f\x98\x80", b"\x20a", b"\xff\xfe", b"\xc3\xa9\xc3"]:
            samples.append([sp.piece_to_id(f"<0x{b:02X}>") for b in data])
    return [{"ids": ids, "text": sp.decode(ids)} for ids in samples]


def main():
    assert spm.__version__ == VERSION, f"expected sentencepiece {VERSION}, got {spm.__version__}"
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    rules = out / "rules.tsv.tmp"
    hexes = lambda s: " ".join(f"{ord(c):X}" for c in s)
    rules.write_text("".join(f"{hexes(k)}\t{hexes(v)}\n" for k, v in RULES.items()))
    llama = train(None, model_type="bpe", vocab_size=620, byte_fallback=True, split_digits=True,
                  add_dummy_prefix=True, remove_extra_whitespaces=False,
                  allow_whitespace_only_pieces=True, character_coverage=0.99)
    models = {
        "llama": llama,
        "rules": train(rules, model_type="bpe", vocab_size=560, byte_fallback=True),
        "loose": train(None, model_type="bpe", vocab_size=420, split_by_whitespace=False,
                       add_dummy_prefix=False, remove_extra_whitespaces=False,
                       character_coverage=0.99, max_sentencepiece_length=24),
        "unused": with_unused(llama),
    }
    unigram = train(None, model_type="unigram", vocab_size=150)
    rules.unlink()

    goldens = {}
    for seed, (name, data) in enumerate(models.items()):
        (out / f"{name}.model").write_bytes(data)
        sp = spm.SentencePieceProcessor(model_proto=data)
        texts = TEXTS + [line for line in CORPUS.strip().split("\n")][:8] + random_texts(seed)
        texts = [t for t in texts if not any(0xD800 <= ord(c) < 0xE000 for c in t)]
        goldens[name] = {
            "vocab_size": sp.vocab_size(), "bos": sp.bos_id(), "eos": sp.eos_id(), "texts": texts,
            "ids": [sp.encode(t) for t in texts], "decode": decodings(sp, texts, seed),
        }
    (out / "unigram.model").write_bytes(unigram)
    with open(out / "goldens.json", "w", encoding="utf-8") as f:
        json.dump({"sentencepiece": VERSION, "models": goldens}, f, ensure_ascii=True,
                  separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
