"""Texts of every kind: a few kilobytes with their ids for the tests, whole corpora for `texts.sh`.

    python scripts/golden/texts.py fixture OUT                         tests/golden/texts
    python scripts/golden/texts.py corpora PACKAGES OUT                a folder a corpus, from unpacked packages
    python scripts/golden/texts.py compare NAME SOURCES WORK JSON MODEL   prints a line, or ends at the first difference
"""

import json
import random
import sys
import sysconfig
from pathlib import Path

from tokens import compare, documents, encoder

HERE = Path(__file__).resolve().parents[2]
LONG = 50_000_000  # bytes of the long document

ENGLISH = """The harbour was quiet that morning. Two boats, whose owners nobody knew, lay at anchor; a third had left
before dawn. "Did you count them?" she asked. "I didn't -- it wasn't my job," he said, and that was true: in 1987 the
town's council (all 12 of them) had given the counting to somebody else, for $3,450.75 a year.

It's well-known that naive readers re-read; the cooperative ones don't. E-mail: someone@example.org, #42, 100%, A/B."""

CODE = '''import math

def attention(q, k, v, *, causal=True):
    """Softmax of q k^T / sqrt(d), times v."""
    scores = (q @ k.T) / math.sqrt(q.shape[-1])  # (T, T)
\tif causal and not isinstance(scores, list):
        scores[~mask] = -1e9
    return {"y": softmax(scores) @ v, 'n': len(q) ** 2 % 7}
'''

C = """#define MAX(a,b) ((a)>(b)?(a):(b))
static inline uint32_t mix(uint32_t x) {
\tx ^= x >> 16;\tx *= 0x85ebca6bU; /* murmur's */
\tfor (int i = 0; i < 10; ++i) { if (!(x & 1u<<i)) continue; y[i] += 3.14e-5f; }
\treturn x;
}
"""

CHINESE = ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u6e56\u8fb9\u6563\u6b65\u3002\u201c\u4f60\u770b\u89c1\u90a3\u53ea"
           "\u8239\u4e86\u5417\uff1f\u201d\u4ed6\u95ee\u3002\n\u3000\u30002026\u5e7411\u670828\u65e5\uff0c\u6c14\u6e29\u4e3a12.5\u2103\uff1b"
           "\u7528Python\u5199\u7684\u7a0b\u5e8f\uff08\u7248\u672c3.11\uff09\u8fd0\u884c\u826f\u597d\u3002")
TRADITIONAL = "\u7e41\u9ad4\u4e2d\u6587\u8207\u7f55\u898b\u5b57\uff1a\U00020000\U0002a6d6\u3400\u9fa5\uff0c\u300c\u9f98\u300d\u3002"

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"

# A name for the messages of the test, then the text.
TEXTS = [
    ("English", ENGLISH), ("code", CODE), ("C", C), ("Chinese", CHINESE), ("traditional", TRADITIONAL),
    ("mixed scripts", "caf\u00e9 cafe\u0301 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
                      "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u3072\u3089 \u30ab\u30ca"),
    ("emoji", "ok \U0001f600! \U0001f600\U0001f600\U0001f999 a\U0001f44db \u2764\ufe0f \u2764 \u2764\ufe0e 1\ufe0f\u20e3 \u00a9\ufe0f"),
    ("skin tones", "\U0001f44d\U0001f3fb\U0001f44d\U0001f3ff \U0001f3fd alone, \U0001f469\U0001f3fe\u200d\U0001f4bb"),
    ("joined emoji", f"{FAMILY} {FAMILY[:5]}{FAMILY[:4]} \u200d \U0001f3f3\ufe0f\u200d\U0001f308{FAMILY}"),
    ("flags", f"\U0001f1e9\U0001f1ea\U0001f1e8\U0001f1f3\U0001f1e7 half, {SCOTLAND}, {SCOTLAND[:-1]}"),
    ("CRLF", ENGLISH.replace("\n", "\r\n")), ("CR", CODE.replace("\n", "\r")), ("line ends", "\r\n\r\n\n\r\r\n a\r\n\tb\r"),
    ("NUL", "\0"), ("NUL within", "a\0b\0\0 c\0"), ("controls", "\x01\x02\x08\x0b\x0c\x1b[0m\x7f\x85\u2028\u2029"),
    ("white space", "   \t \n  "), ("a space", " "), ("spaces of Unicode", "\u00a0a\u2003b\u3000c\u200bd\ufeffe\u00ad"),
    ("a long word", "supercalifragilistic" * 30), ("a run", "a" * 300 + " " * 70 + "=" * 120),
    ("no characters", "\ufffd\ufffe\uffff\U0010ffff\ue000"), ("marks", "q\u0301\u0323\u0302 Z\u0351\u0352a\u0310\u030f\u0310lgo"),
    ("special tokens", "a</s>b <s> <unk> <0x41> </s> <|endoftext|>x"), ("ends as a document", "text</s>"), ("spelt spaces", "\u2581a \u2581\u2581 b"),
]

# Rows that are left out, as bytes.
DAMAGED = [
    b'{"text": "caf\xe9"}', b'{"text": "cut \xe4\xbd"}', b'{"text": "overlong \xc0\xaf"}', b'{"text": "\xed\xa0\x80 half"}',
    b'{"text": "\xf5\x80\x80\x80"}', b'{"text": "good", "other": "\xff"}', b'\xff\xfe{"text": "x"}',
    rb'{"text": "\ud83d alone"}', b'{"text": "no end', b'{"text": "two"} {"text": "values"}', b"{'text': 'quotes'}",
    b'{"text": null}', b'{"text": ["a"]}', b'{"body": "x"}', b'["text"]', b"3", b'{"text": ""}', b'{"text": "a\tb"}',
]


def line(text, escaped=False):
    return json.dumps({"text": text}, ensure_ascii=escaped).encode()


def write_fixture(out):
    """Sources in which every kind of text is, and what both peers make of them."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (_, text) in enumerate(TEXTS):
        rows.append(line(text))
        if i < len(DAMAGED):
            rows.append(DAMAGED[i])
    (out / "rows.jsonl").write_bytes(b"\n".join(rows))
    escaped = [line(text, escaped=True) for _, text in TEXTS[::3]]
    (out / "windows.jsonl").write_bytes(b"\r\n".join([b"", *escaped, b"  ", DAMAGED[0], b'{"text": ""}', b""]))
    files = {
        "bom": "\ufeffFirst, a mark.\n".encode(), "chinese": CHINESE.encode(), "crlf": C.replace("\n", "\r\n").encode(),
        "empty": b"", "emoji": f"{FAMILY}\r\n{SCOTLAND}".encode(), "invalid": b"good until \xe2\x82 here", "latin": "caf\u00e9".encode("latin1"),
        "nul": b"\0a\0", "utf16": "wide".encode("utf-16"),
    }
    for name, data in files.items():
        (out / f"{name}.txt").write_bytes(data)
    peers = {"tokenizers": "data/quickstart/tokenizer/tokenizer.json", "sentencepiece": "tests/golden/tokenizer/llama.model"}
    expected = {}
    for kind, ending in ("jsonl", "jsonl"), ("text", "txt"):
        here, names, skipped = [], [], {}
        for path in sorted(out.glob(f"*.{ending}")):
            for text, why in documents(path):
                if why:
                    skipped[why] = skipped.get(why, 0) + 1
                else:
                    here.append(text)
                    names.append(next((name for name, other in TEXTS if other == text), path.name))
        expected[kind] = {"names": names, "skipped": skipped}
        for peer, path in peers.items():
            expected[kind][peer] = encoder(str(HERE / path))(here)
    lines = json.dumps(expected).replace("]], ", "]],\n").replace("], [", "],\n[")
    (out / "expected.json").write_text(lines + "\n")


def poems(folder):
    """Poems and lives of their authors: verse and prose."""
    for path in sorted(folder.rglob("*.json")):
        if "error" in path.parts or path.name in ("package.json", "manifest.json"):
            continue
        try:
            values = json.loads(path.read_bytes())
        except ValueError:
            continue
        for value in values if isinstance(values, list) else []:
            if not isinstance(value, dict):
                continue
            lines = value.get("paragraphs") or value.get("desc") or value.get("description")
            text = "\n".join(lines) if isinstance(lines, list) else lines
            if text:
                yield "\n".join(filter(None, [value.get("title") or value.get("name"), value.get("author"), text]))


def emoji_texts(packages):
    """Every emoji and every part of one: alone, joined to others, within words."""
    sys.path.insert(0, str(packages / "python"))
    import emoji

    emojis = sorted(emoji.EMOJI_DATA)
    yield from emojis
    for one in emojis:
        yield from (one[:n] for n in range(1, len(one)))
        yield from (one[n:] for n in range(1, len(one)))
        yield f"so {one}, and{one}{one} {one}."
    blocks = [(0x2190, 0x2C00), (0x3000, 0x3300), (0x1F000, 0x1FB00), (0xFE00, 0xFE10), (0xE0000, 0xE0080)]
    yield from (chr(c) for first, end in blocks for c in range(first, end))
    letters = [chr(0x1F1E6 + i) for i in range(26)]
    yield from (a + b for a in letters for b in letters)  # flags, also of no country
    rng = random.Random(1)
    for _ in range(2000):
        yield "".join(rng.choice(emojis + ["\u200d", "\ufe0f", " ", "a "]) for _ in range(rng.randrange(2, 60)))
    yield "".join(emojis)


FOREIGN = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe4\xbd", b"\xf8\x88\x80\x80\x80", b"\x80"]
# Without what JSON would escape.
PLAIN = bytes(c if c >= 32 and c not in b'"\\' else 32 for c in range(256))


def broken(data, rng):
    """Bytes of a text that are no UTF-8 any more."""
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(FOREIGN) + data[at:]


def damaged_rows(texts, rng):
    """Rows of which three in four are damaged, in all the ways there are."""
    for i, text in enumerate(texts):
        if i % 4 == 0:
            yield line(text, escaped=i % 8 == 0)
        elif i % 4 == 1:
            # Foreign bytes within the text and no escapes: nothing else is wrong with the row.
            plain = broken(text.encode(), rng).translate(PLAIN)
            yield b'{"text": "' + plain + b'"}'
        elif i % 4 == 2:
            yield rng.choice(DAMAGED)
        else:
            row = line(text)
            yield row[: rng.randrange(1, len(row) - 1)]  # cut off, perhaps within a character


def write_rows(folder, rows, end=b"\n", files=3):
    folder.mkdir(parents=True)
    rows = list(rows)
    size = -(-len(rows) // files)
    for i in range(0, len(rows), size):
        (folder / f"{i // size:02}.jsonl").write_bytes(end.join(rows[i : i + size]) + end)


def write_texts(folder, texts):
    folder.mkdir(parents=True)
    for i, data in enumerate(texts):
        (folder / f"{i:05}.txt").write_bytes(data)


def long_document(parts):
    out, size = [], 0
    while size < LONG:
        for part in parts:
            out.append(part)
            size += len(part.encode())
            if size >= LONG:
                break
    return "\n".join(out)


def write_corpora(packages, out):
    rng = random.Random(0)
    texts = sorted((packages / "node").rglob("*.txt"))
    texts = [p for p in texts if p.name not in ("contents.txt", "data.txt")]  # the parts are there one by one
    english = [p.read_text(encoding="utf-8") for p in texts]
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [p.read_bytes() for p in sorted(library.rglob("*.py")) if "-packages" not in str(p)]  # a few are no UTF-8
    chats = sorted((packages / "python/chatterbot_corpus").rglob("*chinese/*.yml"))
    chinese = [p.read_text(encoding="utf-8") for p in chats] + list(poems(packages / "node"))[:60_000]
    readable = [data.decode(errors="replace") for data in code if data]
    empty = ["", " ", "\n", "\r\n", "\t", "\u3000", "\ufeff", "\u200b", "a", "  "]

    write_rows(out / "english", map(line, english))
    write_texts(out / "code", code)
    write_rows(out / "chinese", map(line, chinese))
    write_rows(out / "emoji", map(line, emoji_texts(packages)))
    write_texts(out / "crlf", [t.replace("\n", end).encode() for end in ("\r\n", "\r") for t in english[:60] + readable[::10]])
    write_rows(out / "crlf-rows", [line(t.replace("\n", "\r\n"), i % 2 == 0) for i, t in enumerate(readable[::12])], b"\r\n")
    write_rows(out / "empty", [line(rng.choice(empty)) if rng.random() < 0.9 else b"" for _ in range(20_000)])
    write_texts(out / "empty-files", [rng.choice(empty).encode() for _ in range(400)])
    mixed = [text for text in english[:200] + readable[::8] + chinese[:6000] if text]
    write_rows(out / "invalid", damaged_rows(rng.sample(mixed, len(mixed)), rng))
    write_texts(out / "invalid-files", [broken(t.encode(), rng) if i % 2 else t.encode() for i, t in enumerate(mixed[:600])])
    parts = [text for three in zip(english, readable[5:], ["\n".join(chinese[i : i + 99]) for i in range(0, 60_000, 99)]) for text in three]
    text = long_document(parts)
    write_texts(out / "long", [text.encode()])
    write_rows(out / "long-row", [line(text)], files=1)
    for folder in sorted(out.iterdir()):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"golden: {folder.name}, {size / 1e6:.1f} MB", file=sys.stderr)


def print_comparison(name, sources, work, tokenizer_json, model):
    files = [str(path) for path in Path(sources).iterdir()]
    size = sum(Path(path).stat().st_size for path in files)
    count, ids, skipped = compare(f"{work}/{name}.json", tokenizer_json, files)
    _, others, again = compare(f"{work}/{name}.model", model, files)
    assert skipped == again, (skipped, again)
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())) or "none"
    print(f"{name:<14}{size / 1e6:>7.1f} MB {count:>7} documents, {ids} ids = tokenizers, {others} = sentencepiece; left out: {reasons}",
          flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "fixture":
        write_fixture(Path(rest[0]))
    elif verb == "corpora":
        write_corpora(Path(rest[0]), Path(rest[1]))
    else:
        print_comparison(*rest)
