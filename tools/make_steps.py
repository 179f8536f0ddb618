"""Makes tiny-steps: data/steps_{base,train,validation,test}.jsonl and data/steps_model/ (a config and a tokenizer, no weights). Worked sums in a few
lines, each of which a program can check, and where one slip spoils the end.

A prompt tells what somebody has, and five times that it becomes more or less, by 1 to 9; the answer works it out, a sum a line, in one of many right
wordings. No number is below 2 or above 60, and each is one token, so a sum is a fact to be learned: 59 numbers and 9 changes, up and down, make about a
thousand of them. `verifier` lists the sums and the end that an answer must hold. All rows are clean, and no problem occurs twice, in one file or in two.

The base rows are for SFT. They teach how to work such a problem out, and the sums up to 30; only a tenth of them may go up to 60, so few that most sums
above 30 occur once or never. In the other rows all numbers are equally likely to begin with. These also hold `rejected`, another wording with one slip of
1 in a sum, from which the rest follows: offline DPO and ORPO need it.
"""
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from make_tiny import CONFIG, options, write_model

NAMES = "Mia Lucy Nora Zoe Clara Tina Julia Sara Ben Tom Leo Paul Noah Felix Hugo Peter".split()
THINGS = "beads shells coins stamps cards nuts apples stones pens cups".split()
VERBS = {"+": "finds buys wins gets makes".split(), "-": "loses sells drops breaks eats".split()}
STEPS, LEAST, MOST = 5, 2, 60
EASY, HARD = 30, 0.1                            # of the base rows: the greatest number, and the share where it is MOST
FIRST, LATER = ("First", "Now"), ("Then", "Next")
LINES = ["{when} {sum}.", "{verb} {b}: {sum}.", "Count {sum} {thing}."]
ENDS = ["So {name} has {end} {thing}.", "{name} keeps {end} {thing}.", "The end: {end} {thing}.", "Answer: {end} {thing}."]
SIZES = {"base": 1500, "train": 256, "validation": 300, "test": 400}
SMALL = CONFIG | {"vocab_size": 480, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}


def problem(rng, most):
    """(name, thing, start, [(verb, signed number), ...]): never below LEAST or above `most`."""
    start = value = rng.randint(LEAST, most)
    changes = []
    while len(changes) < STEPS:
        sign = rng.choice("+-")
        room = min(9, most - value if sign == "+" else value - LEAST)
        if room:
            b = rng.randint(1, room) * (1 if sign == "+" else -1)
            value += b
            changes.append((rng.choice(VERBS[sign]), b))
    return rng.choice(NAMES), rng.choice(THINGS), start, changes


def worked(start, changes, slips=()):
    """(["46 + 6 = 52", ...], the end). slips: how much each result is off."""
    sums = []
    for (_, b), slip in zip(changes, slips or [0] * STEPS):
        sums.append(f"{start} {'+' if b > 0 else '-'} {abs(b)} = {start + b + slip}")
        start += b + slip
    return sums, start


def answer(rng, name, thing, changes, sums, end):
    lines = []
    for i, ((verb, b), line) in enumerate(zip(changes, sums)):
        when = rng.choice(LATER if i else FIRST)
        lines.append(rng.choice(LINES).format(when=when, verb=verb.capitalize(), b=abs(b), sum=line, thing=thing))
    return "\n".join([*lines, rng.choice(ENDS).format(name=name, thing=thing, end=end)])


def slipped(rng, name, thing, start, changes):
    """An answer with one slip, all of whose numbers are within the world's bounds."""
    while True:
        slips = [0] * STEPS
        slips[rng.randrange(STEPS)] = rng.choice((-1, 1))
        sums, end = worked(start, changes, slips)
        if all(LEAST <= int(line.rpartition("=")[2]) <= MOST for line in sums):
            return answer(rng, name, thing, changes, sums, end)


def row(rng, others, split, facts):
    name, thing, start, changes = facts
    sums, end = worked(start, changes)
    said = ", ".join(f"{verb} {abs(b)}" for verb, b in changes)
    made = {"prompt": f"{name}: {start} {thing}, {said}.", "chosen": answer(rng, name, thing, changes, sums, end)}
    if split != "base":
        made["rejected"] = slipped(others, *facts)
        made["verifier"] = {"must": [*sums, f"{end} {thing}"]}
    return made


def main():
    args = options(__doc__)
    rng, others, known, texts = random.Random(args.seed), random.Random(args.seed + 1), set(), []
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            facts = problem(rng, EASY if split == "base" and rng.random() > HARD else MOST)
            sums = tuple(worked(*facts[2:])[0])
            if sums not in known:
                known.add(sums)
                rows.append(row(rng, others, split, facts))
        lines = [json.dumps(one, separators=(",", ":")) + "\n" for one in rows]
        (args.out / f"steps_{split}.jsonl").write_text("".join(lines), "utf-8", newline="\n")
        texts += [part for one in rows for part in (one["prompt"], one["chosen"])] if split in ("train", "validation") else []
        print(f"{split}: {size} rows, {sum(len(one['chosen'].split()) for one in rows) / size:.1f} words an answer")
    write_model(args.out / "steps_model", texts, SMALL)


if __name__ == "__main__":
    main()
