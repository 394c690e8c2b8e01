"""Makes tests/golden/eval: rows of each task's schema, and what lm-evaluation-harness 0.4.13 asks of a model about them.

    python scripts/golden/eval_prompts.py      (needs `pip install lm_eval==0.4.13 accelerate transformers`)

The rows are made up. Prompts are of 0 and of 2 examples, drawn from the judged split itself but for MMLU, whose are of `dev`.
"""

import json
import tempfile
from pathlib import Path

import datasets
from lm_eval.tasks import TaskManager
from lm_eval_tasks import local_task

OUT = Path(__file__).resolve().parents[2] / "tests/golden/eval"


def choices(*texts):
    return {"text": list(texts), "label": ["A", "B", "C", "D"][: len(texts)]}


ROWS = {
    "hellaswag": [
        {
            "activity_label": label,
            "ctx_a": a,
            "ctx_b": b,
            "endings": endings,
            "label": answer,
        }
        for label, a, b, endings, answer in [
            ("Making tea", "[header] How to make tea [title] Boil the water. [step] Fill the kettle.", "then you", ["pour it over the  leaves.", "paint it blue.", "[substeps] sing to it.", "é, à la carte."], "0"),
            ("Rowing", "Two men sit in a boat. They", "ROW across the lake", ["and sleep.", "and reach the shore.", "up a tree.", "into the kitchen."], "1"),
            ("Baking bread", "A woman kneads dough.", "she", ["drives it home.", "reads it a book.", "bakes it for an hour.", "plants it."], "2"),
            ("Chess", "A boy moves a pawn.", "", ["The other boy eats it.", "It rains upwards.", "The board melts.", "His friend moves a knight."], "3"),
        ]
    ],
    "openbookqa": [
        {"question_stem": "Ice is", "choices": choices("hot", "frozen water", "a metal", "loud"), "answerKey": "B"},
        {"question_stem": "Plants need", "choices": choices("light", "shoes", "money", "songs"), "answerKey": " A"},
        {"question_stem": "The moon", "choices": choices("is made of cheese", "shines by itself", "reflects light", "is a lamp"), "answerKey": "C"},
    ],
    "winogrande": [
        {"sentence": "The cup fell on the plate and _ broke, since it was thin.", "option1": "the cup", "option2": "the plate", "answer": "1"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The rope was too short for the well, so _ was tied to another.", "option1": "the rope", "option2": "the well", "answer": "1"},
    ],
    "arc_easy": [
        {"question": "Which is a mammal?", "choices": choices("a trout", "a llama", "a bee", "an oak"), "answerKey": "B"},
        {"question": "What falls from clouds?", "choices": choices("rain", "sand", "coins"), "answerKey": "A"},
        {"question": "Which is hard?", "choices": {"text": ["wool", "stone", "milk", "air"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"},
    ],
    "boolq": [
        {"question": "is the sea salty", "passage": "Sea water holds salt.\nRivers hold little.", "answer": True},
        {"question": "do stones float", "passage": "Most stones sink. Pumice floats.", "answer": False},
        {"question": "is noon at night", "passage": "At noon the sun is high.", "answer": False},
    ],
    "piqa": [
        {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
        {"goal": "Dry a shirt.", "sol1": "Put it under water.", "sol2": "Hang it in the sun.", "label": 1},
        {"goal": "Cut paper", "sol1": "with scissors", "sol2": "with a spoon", "label": 0},
    ],
}
MMLU = {
    "dev": [
        {"question": f"What is {a} + 1?", "choices": [str(a + i) for i in range(4)], "answer": 1} for a in range(5)
    ],
    "test": [
        {"question": " Which number is even?\n", "choices": ["1", "4", "5", "9"], "answer": 1},
        {"question": "Which number is prime?", "choices": ["4", "6", "7", "9"], "answer": 2},
    ],
}


def write(rows, folder):
    """As `datasets` saves a set: an Arrow stream."""
    with tempfile.TemporaryDirectory() as saved:
        datasets.Dataset.from_list(rows).save_to_disk(saved)
        folder.mkdir(parents=True, exist_ok=True)
        source = next(Path(saved).glob("*.arrow"))
        (folder / source.name).write_bytes(source.read_bytes())


def requests(name, shots):
    with tempfile.TemporaryDirectory() as folder:
        local_task(name, OUT, Path(folder))
        manager = TaskManager(include_path=folder)
        task = manager.load_task_or_group([f"local_{name}"])[f"local_{name}"]
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        return [[instance.doc_id, *instance.args] for instance in task.instances]


def main():
    for name, rows in ROWS.items():
        write(rows, OUT / name / "validation")
    for split, rows in MMLU.items():
        write(rows, OUT / "mmlu/elementary_mathematics" / split)
    names = [*ROWS, "mmlu_elementary_mathematics"]
    asked = {name: {str(shots): requests(name, shots) for shots in (0, 2)} for name in names}
    (OUT / "requests.json").write_text(json.dumps(asked, ensure_ascii=False, indent=1) + "\n")
    print({name: len(of["2"]) for name, of in asked.items()})


if __name__ == "__main__":
    main()
