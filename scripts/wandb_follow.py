#!/usr/bin/env python3
"""Follows a training run into Weights & Biases.

    scripts/wandb_follow.py OUT_DIR [--project P] [--name N] [--once]

Start it before, during or after the run, on any machine that sees the run's folder. It reads
OUT_DIR/metrics.jsonl line by line as it grows, with OUT_DIR/config.yaml as the run's config, until
Ctrl-C; `--once` sends what is there and leaves. Training neither waits for it nor needs wandb.

The W&B run's id and the last step sent are kept in OUT_DIR/wandb_run.txt: started again, it goes on
in the same W&B run and sends nothing twice. A training run that is resumed from a checkpoint drops
the lines behind that checkpoint from metrics.jsonl; those steps were sent already, and W&B takes
only rising steps, so they are skipped until the run is past where it was. A training run that was
started afresh in the same folder becomes a new W&B run.

`WANDB_MODE=offline` writes to OUT_DIR/wandb only; `wandb sync` sends it later.
Needs: pip install wandb (tried with 0.22.3; it brings pyyaml, which reads the config).
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

POLL_SECONDS = 2.0

# key in metrics.jsonl -> name in W&B (the names of the TensorBoard events)
NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_sec": "throughput/tokens_per_sec",
    "tokens_per_sec_per_gpu": "throughput/tokens_per_sec_per_gpu",
    "iter_time_ms": "throughput/iter_time_ms",
    "mfu": "throughput/mfu",
    "mfu_causal": "throughput/mfu_causal",
    "peak_memory_gib": "memory/peak_gib",
    "val_loss": "val/loss",
    "val_ppl": "val/ppl",
}


class Tail:
    """Whole lines of a growing file. Notices a rewritten file: shorter, or another inode."""

    def __init__(self, path):
        self.path = path
        self.start()

    def start(self):
        self.offset = 0
        self.inode = None

    def read(self):
        """(rewritten, new records). A line still being written waits for its end."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                rewritten = self.inode not in (None, stat.st_ino) or stat.st_size < self.offset
                if rewritten:
                    self.start()
                self.inode = stat.st_ino
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return False, []
        end = data.rfind(b"\n") + 1
        self.offset += end
        records = []
        for line in data[:end].splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                print(f"warning: skipped a line that is no JSON: {line[:60]!r}", file=sys.stderr)
        return rewritten, records


class State:
    """What was sent so far, kept beside the run."""

    def __init__(self, path):
        self.path = path
        self.run_id, self.sent, self.first_time = None, -1, None
        if path.exists():
            saved = json.loads(path.read_text())
            self.run_id, self.sent = saved["run_id"], saved["sent"]
            self.first_time = saved["first_time"]

    def save(self):
        temporary = self.path.with_suffix(".tmp")
        saved = {"run_id": self.run_id, "sent": self.sent, "first_time": self.first_time}
        temporary.write_text(json.dumps(saved) + "\n")
        os.replace(temporary, self.path)


def read_config(out_dir):
    path = out_dir / "config.yaml"
    if not path.exists():
        return {}
    try:
        import yaml
    except ImportError:
        print("warning: no pyyaml, so the run's config is sent as text", file=sys.stderr)
        return {"config_yaml": path.read_text()}
    return yaml.safe_load(path.read_text()) or {}


def by_step(records):
    """One dictionary a step: its training and its validation values together."""
    steps = {}
    for record in records:
        values = steps.setdefault(record["step"], {"tokens": record["tokens"]})
        for key, name in NAMES.items():
            if record.get(key) is not None:  # null: not finite, or not known on this machine
                values[name] = record[key]
    return sorted(steps.items())


class Follower:
    def __init__(self, args):
        import wandb

        self.wandb = wandb
        self.args = args
        self.out_dir = Path(args.out_dir)
        self.tail = Tail(self.out_dir / "metrics.jsonl")
        self.state = State(self.out_dir / "wandb_run.txt")
        self.run = None
        self.held = []  # records not sent yet
        self.first_time = None  # time of the file's first step

    def open(self):
        self.run = self.wandb.init(
            project=self.args.project,
            name=self.args.name or self.out_dir.resolve().name,
            id=self.state.run_id,
            resume="allow",
            dir=str(self.out_dir),
            config=read_config(self.out_dir),
        )
        self.state.run_id = self.run.id
        self.state.save()

    def poll(self, everything=False):
        """Sends new steps. The newest waits for the next poll: its validation may yet come."""
        rewritten, records = self.tail.read()
        if rewritten:
            self.held, self.first_time = [], None
        self.held += records
        if self.first_time is None and not self.recognise():
            return
        self.held = [r for r in self.held if r["step"] > self.state.sent]
        steps = by_step(self.held)
        ready = steps if everything else steps[:-1]
        if not ready:
            return
        if self.run is None:
            self.open()
        for step, values in ready:
            self.run.log(values, step=step)
        self.state.sent = ready[-1][0]
        self.state.save()

    def recognise(self):
        """Whether there is a step to tell runs apart by: a resumed run keeps the first one's time,
        a fresh one has another, and becomes another W&B run."""
        self.first_time = next((r["time"] for r in self.held if "time" in r), None)
        if self.first_time is None:
            return False
        if self.state.first_time not in (None, self.first_time):
            print("another run has begun in this folder: it becomes a new W&B run")
            if self.run is not None:
                self.run.finish()
            self.run = None
            self.state.run_id, self.state.sent = None, -1
        self.state.first_time = self.first_time
        return True

    def close(self):
        self.poll(everything=True)
        if self.run is not None:
            self.run.finish()
        print(f"sent {self.out_dir}/metrics.jsonl up to step {self.state.sent}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out_dir", help="the run's folder (`out_dir` of its config)")
    parser.add_argument("--project", default="tinyllama", help="W&B project (default: tinyllama)")
    parser.add_argument("--name", help="name of the W&B run (default: the folder's name)")
    parser.add_argument("--once", action="store_true", help="send what is there and leave")
    args = parser.parse_args()
    if not Path(args.out_dir).is_dir():
        sys.exit(f"error: {args.out_dir} is no folder\n\nhint: give the run's `out_dir`")
    try:
        follower = Follower(args)
    except ImportError:
        sys.exit("error: the Python package `wandb` is missing\n\nhint: pip install wandb")
    # A scheduler's SIGTERM ends it as Ctrl-C does: what is there is sent first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while not args.once:
            follower.poll()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    follower.close()


if __name__ == "__main__":
    main()
