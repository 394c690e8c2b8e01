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
    "gsm8k": [
        {"question": "Ann has 3 apples and buys 4. How many has she?", "answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 7"},
        {"question": "A mug costs $1,200. What do 2 cost?", "answer": "2 * 1,200 = 2,400\n#### 2,400"},
        {"question": "Half of 9?", "answer": "9 / 2 = 4.5\n#### 4.5"},
    ],
    "drop": [
        {"passage": "In 1942 the fleet had 12 ships. Two sank.", "question": "How many were left?", "answers": [["10"], ["ten"]]},
        {"passage": "Tom and Ann won.", "question": "Who won?", "answers": [["Tom", "Ann"]]},
        {"passage": "It rained on 3 May.", "question": "When did it rain?", "answers": [["3 May"]]},
    ],
    "wikitext": [
        {"page": " \n = Tea = \n \n Tea is a drink . It is drunk warm , mostly ; see \" leaves \" . \n = = History = = \n A well @-@ known drink of 1 @,@ 000 N years ( or more ) . \n"},
        {"page": " \n = A \n = = = Deep = = = \n The ship 's crew said : ' yes ! ' [ 3 ] at 20 ° C and 3 @.@ 5 m { x } , why ? s ' \n = = = = Deeper = = = = \n "},
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
        return [[instance.doc_id, *pair(task, instance.args)] for instance in task.instances]


def pair(task, arguments):
    """Context and continuation; one of them is empty where an answer is written, or a text predicted."""
    return {"generate_until": (arguments[0], ""), "loglikelihood_rolling": ("", arguments[0])}.get(task.OUTPUT_TYPE, arguments)


def main():
    for name, rows in ROWS.items():
        write(rows, OUT / name / ("test" if name == "gsm8k" else "validation"))
    for split, rows in MMLU.items():
        write(rows, OUT / "mmlu/elementary_mathematics" / split)
    names = [*ROWS, "mmlu_elementary_mathematics"]
    asked = {name: {str(shots): requests(name, shots) for shots in (0, 2) if name != "wikitext" or shots == 0} for name in names}
    (OUT / "requests.json").write_text(json.dumps(asked, ensure_ascii=False, indent=1) + "\n")
    print({name: len(of["0"]) for name, of in asked.items()})


if __name__ == "__main__":
    main()
