#!/usr/bin/env python3
"""Whether N ranks train as one does, go on in fewer, and end when one of them dies.

    python3 scripts/check_ranks.py CONFIG RANKS MICRO_BATCH [more arguments of `pretrain`]
    python3 scripts/check_ranks.py configs/tinyllama-1xh100.yaml 8 8
    python3 scripts/check_ranks.py configs/quickstart.yaml 8 2 --set device=cpu

Twenty steps of RANKS x MICRO_BATCH sequences by one rank, which accumulates, and by RANKS in every strategy: how far
apart their losses are, as a part of themselves. What RANKS saved at step 10 goes on in half as many, and in half of
those: the same of the other ten. Then the last of RANKS is killed: seconds until the job is over.

Exits 1 where a killed rank leaves the job running, or losses are further apart than --tolerance: if that is not given,
ten times what other rounding alone does, which is seen of one rank with smaller micro-batches. TINYLLAMA names another
program.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

STEPS, SAVED = 20, 10
STRATEGIES = ["full_shard", "shard_grad_op", "hybrid_shard", "ddp"]
# NVLink multicast can put a shared host's cards out of service.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", **os.environ}
PATIENCE = 30  # seconds in which a job ends whose rank was killed


def command(args, out, ranks, sets, more=()):
    values = {
        "out_dir": out,
        "train.global_batch_size": args.ranks * args.micro_batch,
        "train.micro_batch_size": args.micro_batch,
        "train.max_steps": STEPS,
        # Slow enough for no spike, in which differences of the last digit grow to per cents.
        "optimizer.lr": 1e-5,
        "train.min_lr": 1e-6,
        "train.lr_warmup_steps": STEPS,
        "train.log_interval": 1,
        "train.save_interval": "null",
        "train.keep_last": 2,
        "eval.interval": 1000 * STEPS,
        "eval.final_validation": "false",
        **sets,
    }
    program = os.environ.get("TINYLLAMA", "target/release/tinyllama")
    return [program, "pretrain", args.config, "--devices", str(ranks), *more, *args.more] + [
        x for key, value in values.items() for x in ("--set", f"{key}={value}")
    ]


def train(args, out, ranks, strategy, more=(), **sets):
    """The losses by step, and the seconds for which saving kept training waiting."""
    if ranks > 1:
        sets["distributed.strategy"] = strategy
    if strategy == STRATEGIES[0]:
        sets["train.save_interval"] = SAVED
    done = subprocess.run(command(args, out, ranks, sets, more), env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{ranks} ranks, {strategy}: exit {done.returncode}\n{done.stderr[-3000:]}")
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return losses, [float(s) for s in re.findall(r"which waited ([0-9.]+) s", done.stderr)]


def apart(got, want):
    if sorted(got) != [step for step in sorted(want) if step >= min(got)]:
        sys.exit(f"steps {sorted(got)}, expected those of {sorted(want)}")
    return max(abs(loss / want[step] - 1) for step, loss in got.items())


def children(parent):
    """Processes that it started, by /proc: `pid (name) state parent ...`."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def kill_one(args, out):
    """Seconds from the death of a rank to that of its job, and the last line that the job says."""
    run = command(args, out, args.ranks, {"train.max_steps": 1000 * STEPS})
    job = subprocess.Popen(run, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
        if job.poll() is not None:
            sys.exit(f"the job ended before it trained\n{job.stderr.read()[-3000:]}")
        time.sleep(0.2)
    os.kill(max(children(job.pid)), signal.SIGKILL)
    killed = time.monotonic()
    try:
        _, said = job.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill()
        return None, ""
    told = [line for line in said.splitlines() if line.startswith("error")]
    return time.monotonic() - killed, told[-1] if told else ""


def main():
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("config")
    parser.add_argument("ranks", type=int)
    parser.add_argument("micro_batch", type=int)
    parser.add_argument("--tolerance", type=float)
    args, args.more = parser.parse_known_args()
    failed, tolerance = False, args.tolerance
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def row(what, got, want, stalls=()):
            nonlocal failed
            difference = apart(got, want)
            failed |= tolerance is not None and not difference <= tolerance
            waited = f", saving kept it waiting {max(stalls):.2f} s" if stalls else ""
            print(f"{what:<36} losses {min(got)} to {max(got)} apart {difference:.1e}{waited}", flush=True)
            return difference

        one, _ = train(args, folder / "one", 1, None)
        shutil.rmtree(folder / "one")
        smaller = max((n for n in range(1, args.micro_batch) if args.micro_batch % n == 0), default=args.ranks)
        other, _ = train(args, folder / "other", 1, None, **{"train.micro_batch_size": smaller})
        shutil.rmtree(folder / "other")
        rounding = row(f"1 rank, micro-batches of {smaller}", other, one)
        tolerance = tolerance if tolerance is not None else max(10 * rounding, 1e-5)
        for strategy in STRATEGIES:
            got, stalls = train(args, folder / strategy, args.ranks, strategy)
            row(f"{args.ranks} ranks, {strategy}", got, one, stalls)
            if strategy != STRATEGIES[0]:
                shutil.rmtree(folder / strategy)
        saved = folder / STRATEGIES[0] / f"step-{SAVED:08}"
        for ranks in sorted({max(1, args.ranks // 2), max(1, args.ranks // 4)}, reverse=True):
            out = folder / f"resumed-{ranks}"
            got, _ = train(args, out, ranks, STRATEGIES[0], ("--resume", str(saved)))
            row(f"saved by {args.ranks}, resumed by {ranks}", got, one)
            shutil.rmtree(out)
        if args.ranks > 1:
            seconds, told = kill_one(args, folder / "killed")
            failed |= seconds is None
            ended = "runs on after 30 s" if seconds is None else f"over {seconds:.1f} s later: {told}"
            print(f"{'kill -9 of a rank':<36} {ended}")
    sys.exit(failed)


main()
