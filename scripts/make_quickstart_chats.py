#!/usr/bin/env python3
"""Writes data/quickstart/chats.jsonl: short made-up conversations of one or two questions, in the `messages` layout.

    python3 scripts/make_quickstart_chats.py
"""

import json
import random

OPPOSITES = ("hot cold,big small,old new,long short,high low,rich poor,strong weak,open closed,early late,first last,"
             "good bad,fast slow,war peace,north south,east west,day night,up down,left right,full empty,free bound").split(",")
WORDS = "state union people congress peace nation work year world law home farm ship rail bank".split()
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Nora Oscar Paul Rose Sam Tom Vera".split()


def question(rng):
    kind = rng.randrange(6)
    if kind == 0:
        n = rng.randrange(1, 99)
        return f"What comes after {n}?", f"After {n} comes {n + 1}."
    if kind == 1:
        one, other = rng.choice(OPPOSITES).split()
        return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    if kind == 2:
        word = rng.choice(WORDS)
        return f"Spell the word {word}.", "-".join(word)
    if kind == 3:
        name = rng.choice(NAMES)
        return f"Say hello to {name}.", f"Hello, {name}!"
    if kind == 4:
        a, b = rng.choice(NAMES), rng.choice(NAMES)
        return f"Who is here: {a} and {b}?", f"{a} and {b} are here."
    word = rng.choice(WORDS)
    return f"Say {word} twice.", f"{word} {word}"


def main():
    rng = random.Random(7)
    with open("data/quickstart/chats.jsonl", "w", encoding="utf-8") as out:
        for _ in range(1000):
            messages = []
            for _ in range(rng.choice([1, 1, 2])):
                asked, said = question(rng)
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
