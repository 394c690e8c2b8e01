"""Files of `torch.save` in every layout, for the reader in `src/checkpoint/torch_file/`.

    python scripts/golden/torch_files.py [--out DIR] [--check] [--big DIR]

Needs torch and numpy; run by hand, in `.venv-golden` (see `check.sh`). Writes `*.pt` and `manifest.json` into
tests/golden/torch_file, which the suite's test `torch_file` reads:

    {"files": {file: content}, "contents": {content: {"tensors": [{name, dtype, shape, sha256}],
                                                      "values": {dotted path: value}}}}

`sha256` is of the tensor's contiguous little-endian bytes; a name is the path of keys joined by dots. The files
themselves differ from run to run (the old layout names storages by their address), what they hold does not:
`--check` makes all anew and compares the manifests, and loads the committed files with `torch.load`.

`--big DIR` writes one file above 4 GiB there (64-bit zip fields), to be tried by hand.
Works with old versions of torch too (tried: see `main`), which write other files of the same meaning.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import tempfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/torch_file"
NEW = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
          "complex128"]
RECENT_DTYPES = ["uint64", "uint32", "uint16", "float8_e4m3fn", "float8_e5m2"]  # no storage class of their own


def pattern(dtype, n=6):
    """n elements whose bytes count up; no bool but 0 and 1."""
    if dtype == "bool":
        return torch.tensor([i % 3 == 0 for i in range(n)])
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    array = np.arange(1, n * size + 1, dtype=np.uint8)
    if NEW >= (2, 0):
        return torch.from_numpy(array).view(getattr(torch, dtype))
    return torch.arange(1, n + 1).to(getattr(torch, dtype))


def dtypes(names):
    return OrderedDict((name, pattern(name)) for name in names)


def views():
    """One storage shown in many ways."""
    x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    y = torch.arange(5, dtype=torch.int16)
    return {"whole": x, "row": x[1], "tail": x[:, 1:], "column": x[:, :, 2], "transposed": x[0].t(),
            "permuted": x.permute(2, 0, 1), "every_other": x[:, :, ::2], "scalar": x[1, 2, 3], "empty": x[:, 3:],
            "expanded": y[2:3].expand(3, 4), "grown": y[:, None].expand(5, 3), "windows": y.unfold(0, 3, 1),
            "strange_strides": torch.as_strided(y, (1, 3), (9999, 1), 1), "none": torch.empty(0, 3)}


def module():
    """A small module and an optimizer after two steps."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.full((2, 3), 0.5 + step)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def checkpoint():
    """What a training script saves: lit-gpt's keys, and all that gets into hyper-parameters."""
    model, optimizer = module()
    hparams = {"learning_rate": np.float64(4e-4), "eps": np.float32(0.5), "half": np.float16(-0.375),
               "n_layer": np.int64(-22), "byte": np.uint8(200), "wide": np.uint64(2**64 - 1), "flag": np.bool_(True),
               "name": "tiny_LLaMA_1b", "text": np.str_("numpy"), "unicode": "gr\u00fc\u00df \U0001f600", "none": None,
               "yes": True, "no": False, "betas": (0.9, 0.95), "big": 2**70, "seed": 2**63 + 5, "minus": -1,
               "below": -2**31 - 1, "infinite": float("inf"), "path": pathlib.PosixPath("/out/run/1"),
               "relative": pathlib.PurePosixPath("a/b"), "here": pathlib.PosixPath("."),
               "args": argparse.Namespace(micro_batch=8, nested=argparse.Namespace(deep=[1, (2, 3)])),
               "dtype": torch.bfloat16, "device": torch.device("cuda", 1), "cpu": torch.device("cpu"),
               "size": torch.Size([2, 3]), "layout": torch.strided, "set": {7}, "frozen": frozenset([8]), "list": [],
               "tuple": (), "dict": {}, "bytes": b"\x00\xff", "no_bytes": b"", "bytearray": bytearray(b"ab"),
               "counter": Counter("aab"), "default": defaultdict(list, {"k": [1]}), "complex": 1 + 2j,
               "array": np.arange(3, dtype=np.int32), 3: "int key", (1, 2): "tuple key"}
    shared = [1, 2]
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "hparams": hparams, "iter_num": 1200,
            "step_count": 300, "shared": [shared, shared], "rng": torch.arange(16, dtype=torch.uint8)}


def parameters():
    tied = torch.nn.Parameter(torch.arange(4.0))
    marked = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    marked.note = "an attribute"
    tensor = torch.zeros(2)
    tensor.note = [1]
    return {"a": tied, "b": tied, "list": [torch.nn.Parameter(torch.ones(1, 2)), {"x": torch.tensor(7)}],
            "marked": marked, "tensor_with_attribute": tensor, "buffer": torch.ones(3).requires_grad_()}


def tensors_in(value, path=""):
    """(name, tensor) as the reader names them."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, argparse.Namespace):
        yield from tensors_in(vars(value), path)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(item, f"{path}.{key}" if path else str(key))


def raw(tensor):
    tensor = tensor.detach().contiguous()
    if NEW >= (2, 0):
        return tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return bytes(tensor.flatten().numpy().tobytes()) if tensor.dtype != torch.bfloat16 else None


def plain(value):
    """Scalars as JSON; others by their text or not at all."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype) or isinstance(value, torch.layout):
        return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else str(value)
    if isinstance(value, (pathlib.PurePath, torch.device)):
        return str(value)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return "inf" if value == float("inf") else value
    if isinstance(value, int):
        if -2**63 <= value < 2**64:
            return value
    raise TypeError


def values_in(value, path=""):
    """(path, scalar) for all that has a plain value."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, (str, int)):
                yield from values_in(item, f"{path}.{key}" if path else str(key))
    else:
        try:
            yield path, plain(value)
        except TypeError:
            pass


def describe(value):
    tensors = []
    for name, tensor in tensors_in(value):
        bytes_ = raw(tensor)
        tensors.append({"name": name, "dtype": str(tensor.dtype).replace("torch.", ""), "shape": list(tensor.shape),
                        "sha256": None if bytes_ is None else hashlib.sha256(bytes_).hexdigest()})
    return {"tensors": tensors, "values": dict(values_in(value))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--check", action="store_true", help="compare with the committed manifest")
    parser.add_argument("--big", type=pathlib.Path, help="write a file above 4 GiB into this folder")
    options = parser.parse_args()
    if options.big:
        value = {f"w{i}": torch.full((300, 2**20), float(i)) for i in range(4)}
        torch.save(value, options.big / "big.pt")
        return
    out = pathlib.Path(tempfile.mkdtemp()) if options.check else options.out
    out.mkdir(parents=True, exist_ok=True)
    contents = {"checkpoint": checkpoint(), "views": views(), "dtypes": dtypes(DTYPES), "parameters": parameters(),
                "tensor": torch.arange(3)}
    if NEW >= (2, 3):
        contents["dtypes-recent"] = dtypes(RECENT_DTYPES)
    old = {} if NEW < (1, 6) else {"_use_new_zipfile_serialization": False}
    files = {}

    def save(name, content, protocol=2, **how):
        torch.save(contents[content], out / name, pickle_protocol=protocol, **how)
        files[name] = content

    for protocol in (2, 3, 4, 5) if sys.version_info >= (3, 8) else (2, 3, 4):
        save(f"checkpoint-p{protocol}.pt", "checkpoint", protocol)
    save("checkpoint-old-p4.pt", "checkpoint", 4, **old)
    for content in contents:
        if content != "checkpoint":
            save(f"{content}.pt", content)
        if content != "dtypes-recent":  # which the old layout cannot hold
            save(f"{content}-old.pt", content, **old)
    manifest = {"files": files, "contents": {name: describe(value) for name, value in contents.items()}}
    text = json.dumps(manifest, indent=0) + "\n"
    (out / "manifest.json").write_text(text)
    if options.check:
        same = json.loads((HERE / "manifest.json").read_text()) == json.loads(text)
        for name, content in files.items():
            loaded = torch.load(HERE / name, weights_only=False)
            same &= json.loads(json.dumps(describe(loaded))) == json.loads(text)["contents"][content]
        print("torch files: as committed" if same else "torch files: BAD, differ from the committed ones")
        sys.exit(0 if same else 1)
    print(f"{len(files)} files of torch {torch.__version__} in {out}")


if __name__ == "__main__":
    main()
