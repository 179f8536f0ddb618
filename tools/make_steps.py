"""Makes tiny-steps: data/steps_{base,train,validation,test}.jsonl and data/steps_model/ (a config and a tokenizer, no weights). Worked sums in a few
lines, each of which a program can check, and where one slip spoils the end.

A prompt tells what somebody has, and four times that it becomes more or less; the answer works it out, a sum a line, in one of many right wordings. All
numbers have two digits. `verifier` lists the sums and the end that an answer must hold, so it passes if each step is right and follows from the one
before. All rows are clean, and no problem occurs twice, in one file or in two.

The base rows are for SFT: so few that a small decoder learns the sums, but not all of them. The other rows also hold `rejected`,
another wording with one slip in a sum, by 1 or by 10 (as with a carry forgotten), from which the rest follows: offline DPO and ORPO need it.
"""
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tokenizers import pre_tokenizers

from machine.report import passes
from make_tiny import CONFIG, options, write_model

NAMES = "Mia Lucy Nora Zoe Clara Tina Julia Sara Ben Tom Leo Paul Noah Felix Hugo Peter".split()
THINGS = "beads shells coins stamps cards nuts apples stones pens cups".split()
VERBS = {"+": "finds buys wins gets makes".split(), "-": "loses sells drops breaks eats".split()}
STEPS = 4
FIRST, LATER = ("First", "Now"), ("Then", "Next")
LINES = ["{when} {sum}.", "{verb} {b}: {sum}.", "Count {sum} {thing}."]
ENDS = ["So {name} has {end} {thing}.", "{name} keeps {end} {thing}.", "The end: {end} {thing}.", "Answer: {end} {thing}."]
SIZES = {"base": 950, "train": 256, "validation": 200, "test": 240}
SMALL = CONFIG | {"vocab_size": 432, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}


def problem(rng):
    """(name, thing, start, [(verb, signed number), ...]): never below 10 or above 99."""
    while True:
        start = value = rng.randint(10, 99)
        changes = []
        while len(changes) < STEPS:
            sign = rng.choice("+-")
            room = 99 - value if sign == "+" else value - 10
            if room < 10:
                break
            b = rng.randint(10, room)
            value += b if sign == "+" else -b
            changes.append((rng.choice(VERBS[sign]), b if sign == "+" else -b))
        else:
            return rng.choice(NAMES), rng.choice(THINGS), start, changes


def worked(start, changes, slips=()):
    """(["46+16=62", ...], the end). slips: how much each result is off."""
    sums = []
    for (_, b), slip in zip(changes, slips or [0] * STEPS):
        sums.append(f"{start}{b:+d}={start + b + slip}")
        start += b + slip
    return sums, start


def answer(rng, name, thing, changes, sums, end):
    lines = []
    for i, ((verb, b), line) in enumerate(zip(changes, sums)):
        when = rng.choice(LATER if i else FIRST)
        lines.append(rng.choice(LINES).format(when=when, verb=verb.capitalize(), b=abs(b), sum=line, thing=thing))
    return "\n".join([*lines, rng.choice(ENDS).format(name=name, thing=thing, end=end)])


def slipped(rng, name, thing, start, changes):
    """An answer with one slip, all of whose numbers still have two digits."""
    while True:
        slips = [0] * STEPS
        slips[rng.randrange(STEPS)] = rng.choice((-10, -1, 1, 10))
        sums, end = worked(start, changes, slips)
        if all(10 <= int(line.rpartition("=")[2]) <= 99 for line in sums):
            return answer(rng, name, thing, changes, sums, end)


def row(rng, others, split, facts):
    name, thing, start, changes = facts
    sums, end = worked(start, changes)
    said = ", ".join(f"{verb} {abs(b)}" for verb, b in changes)
    made = {"prompt": f"{name}: {start} {thing}, {said}.", "chosen": answer(rng, name, thing, changes, sums, end)}
    if split != "base":
        made["rejected"] = slipped(others, *facts)
        made["verifier"] = {"must": [*sums, f"{end} {thing}"]}
        assert passes(made["chosen"], made["verifier"]), made
        assert not passes(made["rejected"], made["verifier"]), made
    return made


def main():
    args = options(__doc__)
    rng, problems = random.Random(args.seed), {}
    while len(problems) < sum(SIZES.values()):
        facts = problem(rng)
        problems[tuple(worked(*facts[2:])[0])] = facts
    several, others, texts = iter(problems.values()), random.Random(args.seed + 1), []
    for split, size in SIZES.items():
        rows = [row(rng, others, split, next(several)) for _ in range(size)]
        lines = [json.dumps(one, separators=(",", ":")) + "\n" for one in rows]
        (args.out / f"steps_{split}.jsonl").write_text("".join(lines), "utf-8", newline="\n")
        texts += [part for one in rows for part in (one["prompt"], one["chosen"])] if split in ("base", "train") else []
        print(f"{split}: {size} rows, {sum(len(one['chosen'].split()) for one in rows) / size:.1f} words an answer")
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    write_model(args.out / "steps_model", texts, SMALL, digits)


if __name__ == "__main__":
    main()
