"""Compares `evaluate` with lm-evaluation-harness, sample by sample, by hand.

    python scripts/golden/lm_eval_tasks.py HF_FOLDER [--tasks hellaswag,piqa] [--limit 200] [--shots 0] [--data data/eval]

Runs lm_eval 0.4.13 with transformers in fp32 on the sets in `data` and `tinyllama evaluate` (TINYLLAMA names another program)
on the same rows, and prints for each task how many samples chose the same answer, the largest difference of
log-likelihoods, both scores, and how long each took. Needs `pip install lm_eval==0.4.13 transformers`.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

PROGRAM = os.environ.get("TINYLLAMA", Path(__file__).resolve().parents[2] / "target/release/tinyllama")
HARNESS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "drop": "drop/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
CHOICES = ["hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa"]


def local_task(name, data, folder):
    """The harness's own task, with its rows from files. Where the set has no other split, examples come from the judged one,
    and are then never the question itself."""
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    include, rows = HARNESS.get(name), data / name
    if name.startswith("mmlu_"):
        subject = name.removeprefix("mmlu_")
        include, rows = f"mmlu/default/{name}.yaml", data / "mmlu" / subject
    elif name.startswith("bbh_"):
        subject = name.removeprefix("bbh_")
        include, rows = f"bbh/cot_fewshot/{subject}.yaml", data / "bbh" / subject
    files = {split: files_of(rows, split) for split in ("dev", "test", "validation")}
    files = {split: found for split, found in files.items() if found}
    judged = "test" if "test" in files else "validation"
    files = {split: found for split, found in files.items() if split in ("dev", judged)}
    task = {
        "include": str(tasks / include),
        "task": f"local_{name}",
        "dataset_path": "arrow" if files[judged][0].endswith(".arrow") else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": None,
        "test_split": judged,
        "fewshot_split": "dev" if "dev" in files else judged,
    }
    if name == "boolq":
        task["doc_to_target"] = "{{answer|int}}"
    if name == "drop":  # the rows have `answers`, which the harness makes of two other fields
        task |= {"process_docs": None, "doc_to_target": "{{ answers[0]|join(',') }}"}
    if name.startswith("bbh_"):
        del task["fewshot_split"]  # its examples are in its own file
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def files_of(rows, split):
    found = sorted((rows / split).glob("*.arrow")) or sorted(rows.glob(f"{split}.jsonl*"))
    return [str(path) for path in found]


def harness(model, names, args, folder):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in names:
        local_task(name, args.data, folder)
    lm = HFLM(pretrained=model, dtype=args.dtype, device=args.device, batch_size=args.batch_size)
    manager = TaskManager(include_path=str(folder))
    seconds, out = {}, {}
    for name in names:
        start = time.monotonic()
        result = lm_eval.simple_evaluate(
            lm, tasks=[f"local_{name}"], num_fewshot=args.shots, limit=args.limit, task_manager=manager, bootstrap_iters=0
        )
        seconds[name] = time.monotonic() - start
        out[name] = (result["results"][f"local_{name}"], result["samples"][f"local_{name}"])
    return out, seconds


def ours(model, names, args, folder):
    out, seconds = {}, {}
    for name in names:
        command = [PROGRAM, "evaluate", "--checkpoint", model, "--tasks", name]
        command += ["--num-fewshot", args.shots] if args.shots is not None else []
        command += ["--data", args.data, "--out", folder / name, "--log-samples", "--device", args.device]
        command += ["--precision", "32-true" if args.dtype == "float32" else "bf16-true"]
        command += ["--limit", str(args.limit)] if args.limit else []
        subprocess.run(list(map(str, command)), check=True)
        result = json.loads((folder / name / "results.json").read_text())
        samples = [json.loads(line) for line in (folder / name / f"samples_{name}.jsonl").open()]
        out[name], seconds[name] = (result["results"][name], samples), result["evaluation_seconds"][name]
    return out, seconds


def by_doc(samples):
    return {(sample["doc_id"], sample["filter"]): sample for sample in samples}


def arguments(sample):
    """Texts that the model got."""
    all = sample["arguments"]
    pairs = [list(pair.values()) if isinstance(pair, dict) else list(pair) for pair in (all.values() if isinstance(all, dict) else all)]
    return [[part for part in pair if isinstance(part, str)] for pair in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", default=",".join(CHOICES))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int, help="examples; each task's own number if not given")
    parser.add_argument("--data", type=Path, default=Path("data/eval"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", default="16")
    args = parser.parse_args()
    args.data = args.data.resolve()
    names = args.tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs, their_seconds = harness(args.model, names, args, folder)
        mine, my_seconds = ours(args.model, names, args, folder)
    for name in names:
        (their_scores, their_samples), (my_scores, my_samples) = theirs[name], mine[name]
        their_samples, my_samples = by_doc(their_samples), by_doc(my_samples)
        assert their_samples.keys() == my_samples.keys(), (their_samples.keys(), my_samples.keys())
        same, worst, prompts = 0, 0.0, 0
        for key, their in their_samples.items():
            my = my_samples[key]
            prompts += arguments(their) == arguments(my)
            if isinstance(my["resps"][0][0], str):
                same += their["filtered_resps"] == my["filtered_resps"]
                continue
            their_lls = [float(response[0][0] if isinstance(response, (list, tuple)) and isinstance(response[0], (list, tuple)) else response[0]) for response in their["resps"]]
            my_lls = [float(response[0][0] if isinstance(response[0], list) else response[0]) for response in my["resps"]]
            same += max(range(len(their_lls)), key=their_lls.__getitem__) == max(range(len(my_lls)), key=my_lls.__getitem__)
            worst = max(worst, *(abs(a - b) for a, b in zip(their_lls, my_lls)), 0.0)
        scores = {key: (value, my_scores[key]) for key, value in their_scores.items() if key in my_scores and "," in key}
        print(
            f"{name}, {'its own' if args.shots is None else args.shots}-shot: {same} of {len(my_samples)} answered the same, {prompts} had the same prompts; log-likelihoods "
            f"within {worst:.1e}; {their_seconds[name]:.1f} s and {my_seconds[name]:.1f} s; "
            + ", ".join(f"{key} {a if isinstance(a, str) else round(a, 4)} {b if isinstance(b, str) else round(b, 4)}" for key, (a, b) in scores.items())
        )


if __name__ == "__main__":
    main()
