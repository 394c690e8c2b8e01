#!/usr/bin/env python3
"""Reads a run's TensorBoard events with the real tensorboard and compares them with metrics.jsonl.

    tensorboard_check.py OUT_DIR          compare every scalar of every step
    tensorboard_check.py --write-golden   write tests/golden/metrics/events.tfevents
    tensorboard_check.py --check-golden   compare that file with what tensorboard writes

Needs tensorboard==2.20.0. The golden file is written with tensorboard's own protobufs and record
writer; a Rust test holds the project's writer equal to it, byte for byte.
"""

import io
import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/metrics/events.tfevents"

# tag in TensorBoard -> key in metrics.jsonl
TAGS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/tokens": "tokens",
    "throughput/tokens_per_sec": "tokens_per_sec",
    "throughput/tokens_per_sec_per_gpu": "tokens_per_sec_per_gpu",
    "throughput/iter_time_ms": "iter_time_ms",
    "throughput/mfu": "mfu",
    "throughput/mfu_causal": "mfu_causal",
    "memory/peak_gib": "peak_memory_gib",
    "val/loss": "val_loss",
    "val/ppl": "val_ppl",
}


def as_f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def compare(out_dir):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(out_dir), size_guidance={SCALARS: 0})
    events.Reload()
    found = set(events.Tags()["scalars"])
    if unknown := found - set(TAGS):
        sys.exit(f"error: tags that metrics.jsonl knows nothing of: {sorted(unknown)}")

    values = 0
    for tag, key in TAGS.items():
        # A number that is not finite is null in JSON and itself in TensorBoard; an absent one
        # (no peak known for the card) is null in JSON and has no point at all.
        kind = [line for line in lines if ("val_loss" in line) == tag.startswith("val/")]
        want = [(line["step"], line[key]) for line in kind]
        got = [(e.step, e.value) for e in events.Scalars(tag)] if tag in found else []
        if tag not in found:
            want = [(step, value) for step, value in want if value is not None]
        if [step for step, _ in got] != [step for step, _ in want]:
            sys.exit(f"error: {tag}: steps {got[:5]}... in TensorBoard, {want[:5]}... in the file")
        for (step, value), (_, expected) in zip(got, want):
            if expected is None:
                same = not math.isfinite(value)
            else:
                same = value == as_f32(expected)
            if not same:
                sys.exit(f"error: {tag} at step {step}: {value}, metrics.jsonl has {expected}")
        values += len(got)
        print(f"  {tag:<36} " + (f"{len(got):>6} points equal" if got else "     - not logged"))
    files = len(list(out_dir.glob("events.out.tfevents.*")))
    print(f"tensorboard: {values} values in {files} events file(s) = {len(lines)} metrics lines")


def golden_bytes():
    class Sink(io.BytesIO):
        def close(self):
            pass

    def event(wall_time, step=0, scalars=(), **fields):
        out = event_pb2.Event(wall_time=wall_time, step=step, **fields)
        for tag, value in scalars:
            out.summary.value.add(tag=tag, simple_value=value)
        return out.SerializeToString()

    sink = Sink()
    writer = RecordWriter(sink)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    first = [("train/loss", 10.25), ("train/lr", 2e-7), ("throughput/tokens_per_sec", 0.0)]
    last = [("val/loss", math.nan), ("val/ppl", 1e30)]
    writer.write(event(1.5e9, file_version="brain.Event:2"))
    writer.write(event(1.5e9, step=1, session_log=start))
    writer.write(event(1.5e9 + 0.25, step=1, scalars=first))
    writer.write(event(1.5e9 + 1e6, step=715256, scalars=last))
    return sink.getvalue()


def main():
    match sys.argv[1:]:
        case ["--write-golden"]:
            GOLDEN.write_bytes(golden_bytes())
            print(f"wrote {GOLDEN}")
        case ["--check-golden"]:
            if GOLDEN.read_bytes() != golden_bytes():
                sys.exit(f"error: {GOLDEN} is not what tensorboard writes")
            print(f"tensorboard: {GOLDEN.name} is what its own writer writes")
        case [out_dir]:
            compare(Path(out_dir))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
