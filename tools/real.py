"""The study on a real checkpoint, with two tasks whose answers a program can check, by the rules in docs/study.md.

    python tools/real.py constraints --model DIR --data TRAIN.jsonl --eval-data EVAL.jsonl [...]
    python tools/real.py arithmetic  --model DIR --data TRAIN.jsonl --eval-data EVAL.jsonl
    python tools/real.py again       --model DIR --data TRAIN.jsonl --eval-data EVAL.jsonl
    python tools/real.py constraints --report

constraints   rows are any short instructions with their answers. Each prompt is given one of twelve demands ("Use exactly
              two sentences."), and its answer is edited so that it meets the demand; the answer as it was does not
arithmetic    rows are worked sums as GSM8K writes them: <<3*4=12>> after each step, "#### 12" at the end. An answer
              passes if it ends so, holds such steps, and each of them is right; whether it solves the problem is not asked
again         arithmetic once more for one claim, SAPO-ORPO over SFT, with other seeds

All else is as in tools/study.py, whose options this takes too: a base for each seed by SFT, here of a checkpoint that
can chat already; every variant from the seed's base; a line a run in NAME.jsonl, so that it goes on where it was stopped.
"""

import argparse
import functools
import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import study
from machine.dataset import Data
from machine.files import write_json
from machine.flags import parse
from machine.folders import companions, load_pretrained
from machine.rows import read_rows
from machine.text import Text
from measure import base_model, known

BATCH, BUFFER = 8, 64


def variant(name):
    """A variant of the tiny study in batches of this size: (flags, what it is)."""
    flags, words = study.RELATIVES[name]
    return flags.replace(f"--buffer-size {study.BATCH}", f"--buffer-size {BATCH}"), words


def write_rows(path, rows):
    """Rows of (prompt, chosen, rejected); a file that holds them is left alone, as another run may be reading it."""
    lines = "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row))) + "\n" for row in rows)
    if not path.exists() or path.read_text("utf-8") != lines:
        path.write_text(lines, "utf-8")


class Real(study.Study):
    """What both tasks share: variants, claims, rates, and how a checkpoint is opened."""
    command, batch, alike = "tools/real.py", BATCH, {}
    relatives = {
        "SAPO-DPO": variant("SAPO-DPO"), "SFT": variant("SFT"), "SPIN": variant("SPIN"), "on-policy": variant("on-policy"),
        "SAPO-ORPO": variant("SAPO-ORPO"), "a quarter": ("--segment 25%", "B is a quarter of y+"),
        "a sentence": variant("a sentence"), "end rewritten": variant("end rewritten"),
        "DPO and NLL": variant("DPO and NLL"),
        "offline DPO": (variant("offline DPO")[0], "y- is the base's own answer, sampled once; the reference is the base")}
    studied = tuple(relatives)
    claims = {claim: pair for claim, pair in study.CLAIMS.items() if set(pair) <= {"SAPO-DPO", "SFT", "SPIN", "SAPO-ORPO"}}
    claims |= {"EMA, buffer and segment over on-policy": ("SAPO-DPO", "on-policy")}
    bases = {"base": 1, "start": 0}                  # start: the checkpoint itself
    first, tried = {"dpo": (1e-5, 3e-5), "orpo": (1e-5, 3e-5)}, 3
    seeds, steps, sft_steps, token_parts, sampled = 3, 40, 40, (1,), False
    computed = ("SAPO-DPO", "SPIN", "on-policy", "SAPO-ORPO", "SFT", "offline DPO")
    in_pairs = ("SAPO-DPO", "SAPO-ORPO", "a quarter", "a sentence", "end rewritten", "SPIN", "on-policy")
    sizes = {"base": 324, "train": 168, "validation": 60, "test": 108}

    def given(self, args):
        """Takes the checkpoint and the files of rows; the workers' commands begin with `words`."""
        self.model, self.files = args.model, (args.data, args.eval_data)
        self.words = [*self.words, "--model", args.model, "--data", args.data, "--eval-data", args.eval_data]
        self.flags = [*f"--device cpu --batch-size {BATCH} --micro-batch {BATCH} --buffer-size {BUFFER} --segment 50% "
                      f"--optimizer adamw --generate-rows 12 --dtype float32 --eval-every 0 --save-every 0 --keep 0 "
                      "--eval-rows 1 --samples 0".split(), *self.lengths.split(), "--model", args.model,
                      "--data", args.data]

    def splits(self):
        """{split: [(prompt, y+, the same with a fault, whether an answer passes)]}, as many as sizes says at most."""
        made = []
        for path in self.files:
            rows = [row for row in read_rows(path) if isinstance(row.turns, str)]
            made.append(self.made([(row.turns, row.chosen["content"]) for row in rows]))
        splits, begin = {"test": made[1][:self.sizes["test"]]}, 0
        for split in ("base", "train", "validation"):
            splits[split] = made[0][begin:begin + self.sizes[split]]
            begin += self.sizes[split]
        return splits

    def base(self, job):
        """Its folder lies beside the splits; `rejected` of the training rows is the base's own answer to each prompt."""
        self.folder, self.parts = Path(f"{job['bases']}-seed-{job['seed']}"), self.splits()
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / "own.json"
        for split, rows in self.parts.items():
            if split != "train" or not own.exists():     # there its faults stand, until the base has answered
                write_rows(self.path(split), [row[:3] for row in rows])
        if not job["sft_steps"]:
            return Path(self.model)
        sft = (f"--data {self.path('base')} --eval-data {self.path('test')} --sft-data {self.path('base')} --sft-lr 2e-5 "
               f"--sft-steps {job['sft_steps']} --sft-batch-size {BATCH}")
        folder = base_model(job["seed"], [*self.flags, *sft.split()], job["bases"], preset=())
        if not own.exists():
            model, text, cfg = self.opened(folder, job, [])
            data = self.rows("train", text, cfg, None)
            write_json(own, study.heard(model, data, text, cfg, cfg.temperature, cfg.top_k, cfg.top_p)[0])
        answers = [said.strip() or "-" for said in known(own)]
        write_rows(self.path("train"), [(*row[:2], said) for row, said in zip(self.parts["train"], answers)])
        return folder

    def kinds(self):
        return []

    def path(self, split):
        return self.folder.with_name(f"{self.folder.name}-{split}.jsonl")

    def opened(self, folder, job, flags):
        model = load_pretrained(folder)
        cfg = parse([*self.flags, "--seed", str(job["seed"]), *flags]).cfg
        return model, Text(companions(folder), folder, model.config), cfg

    def rows(self, split, text, cfg, n):
        data = Data(read_rows(self.path(split))[:n], text, cfg, split)
        data.checks = [row[3] for row in self.parts[split][:n]]
        if len(data) != len(data.checks):
            raise SystemExit(f"{self.command}: rows of {split} are too long for {self.lengths}")
        return data


# ----------------------------------------------------------------------------- worked arithmetic
STEP = re.compile(r"<<([^<>=]{1,40})=([^<>=]{1,15})>>")
TERM = re.compile(r"[\d.+\-*/() ]+")


def right_step(asked, said):
    """Whether an annotation's two sides, as text, are equal; to a hundredth, as divisions are rounded."""
    if not TERM.fullmatch(asked) or not re.fullmatch(r"-?[\d.]+", said) or re.search(r"\*\*|[\d.)] *\(", asked):
        return False
    try:
        return abs(eval(asked, {"__builtins__": {}}) - float(said)) < 0.01       # of digits and signs alone
    except (SyntaxError, ZeroDivisionError, TypeError, ValueError):
        return False


class Arithmetic(Real):
    name, words, steps_are, tokens = "arithmetic", ["arithmetic"], "steps", 76_000
    lengths = "--max-length 256 --max-prompt-length 128 --eval-tokens 128"
    sizes = {"base": 104, "train": 104, "validation": 40, "test": 108}

    def steps_of(self, answer):
        return [right_step(*sides) for sides in STEP.findall(answer)]

    def passes(self, answer):
        steps = self.steps_of(answer)
        return re.search(r"#### -?[\d.,]+$", answer.strip()) is not None and bool(steps) and all(steps)

    def made(self, rows):
        """The short rows whose own answer passes; the fault is a result that is off by one."""
        made = []
        for prompt, chosen in rows:
            if len(prompt) <= 250 and len(chosen) <= 200 and self.passes(chosen):
                result = STEP.findall(chosen)[-1][1]
                wrong = f"{float(result) + 1:g}"
                made.append((prompt, chosen, chosen.replace(f"={result}>>{result}", f"={wrong}>>{wrong}"), self.passes))
        return [row for row in made if not self.passes(row[2])]


class Again(Arithmetic):
    """One claim of arithmetic once more, with fresh seeds and the rates that were chosen then."""
    name, words = "again", ["again"]
    studied = computed = in_pairs = ("SFT", "SAPO-ORPO")
    relatives = {variant: Real.relatives[variant] for variant in studied}
    claims, bases = {"SAPO-ORPO over SFT, again": studied[::-1]}, {"base": 1}
    first_seed, seeds, first, tried = 4, 3, {"orpo": (3e-5,)}, 1


# ----------------------------------------------------------------------------- demands on real answers
def sentences(answer):
    return [part for part in re.split(r"(?<=[.!?])\s+", answer.strip()) if part]


def numbered(answer):
    return " ".join(f"({i}) {part}" for i, part in enumerate(sentences(answer), 1))


DEMANDS = (     # (what is asked, an answer -> the same so that it is met, whether an answer meets it)
    ("Write in lower case only.", str.lower, lambda a: a == a.lower() and a != a.upper()),
    ("Write in capital letters only.", str.upper, lambda a: a == a.upper() and a != a.lower()),
    ("End your answer with the word DONE.", lambda a: f"{a} DONE", lambda a: re.search(r"\bDONE\W*$", a)),
    ("Begin your answer with the word Certainly.", lambda a: f"Certainly: {a}", lambda a: re.match(r"Certainly\b", a)),
    ("Use exactly two sentences.", lambda a: " ".join([*sentences(a), "That is all."][:2]),
     lambda a: len(sentences(a)) == 2 and all(re.search(r"[.!?]$", part) for part in sentences(a))),
    ("Put the whole answer in double quotation marks.", lambda a: '"' + a.replace('"', "'") + '"',
     lambda a: re.fullmatch(r'"[^"]+"', a)),
    ("Number your sentences: (1), (2) and so on.", numbered, lambda a: a and all(
        part.startswith(f"({i}) ") for i, part in enumerate(sentences(a), 1))),
    ("Write a list with a hyphen before each sentence, one a line.",
     lambda a: "\n".join(f"- {part}" for part in sentences(a)),
     lambda a: a and all(line.startswith("- ") and len(sentences(line)) == 1 for line in a.splitlines())),
    ("Put your answer between <answer> and </answer>.", lambda a: f"<answer>{a}</answer>",
     lambda a: re.fullmatch(r"<answer>[^<>]+</answer>", a)),
    ("End with a question to the reader.", lambda a: f"{a} Does that help?", lambda a: a.endswith("?")),
    ("End every sentence with an exclamation mark.",
     lambda a: " ".join(re.sub(r"[.!?]*$", "!", part, count=1) for part in sentences(a)),
     lambda a: a and all(re.search(r"[^.!?]!$", part) for part in sentences(a))),
    ("Add a postscript that begins with P.S.", lambda a: f"{a}\nP.S. Good luck!", lambda a: re.search(r"\nP\.S\. \w", a)),
)


def meets(demand, answer):
    return bool(DEMANDS[demand][2](answer.strip()))


class Constraints(Real):
    name, words, steps_are, tokens = "constraints", ["constraints"], "", 28_000
    lengths = "--max-length 256 --max-prompt-length 160 --eval-tokens 48"

    def steps_of(self, answer):
        return []

    def made(self, rows):
        """The demands in turn: each short row of one line is put the next that its answer does not meet by itself."""
        made = []
        for prompt, chosen in rows:
            if "\n" in chosen.strip() or len(chosen) > 100 or len(prompt) > 200:
                continue
            made += list(itertools.islice(self.asked(prompt, chosen.strip(), len(made)), 1))
        return made

    def asked(self, prompt, chosen, turn):
        for i in range(turn, turn + len(DEMANDS)):
            demand = i % len(DEMANDS)
            words, edit, _ = DEMANDS[demand]
            if meets(demand, edit(chosen)) and not meets(demand, chosen):
                yield f"{prompt}\n\n{words}", edit(chosen), chosen, functools.partial(meets, demand)


def main(argv=None):
    """Takes the task and its files, and leaves the rest to tools/study.py."""
    argv, tasks = sys.argv[1:] if argv is None else argv, {task.name: task for task in (Arithmetic, Again, Constraints)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)
    parser.add_argument("task", choices=tasks)
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, default="")
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
        return study.main(["--help"], Constraints(), "the options of tools/study.py:")
    args, rest = parser.parse_known_args(argv)
    if "--report" not in rest and not (args.model and args.data and args.eval_data):
        parser.error("--model, --data and --eval-data are needed, or --report")
    task = tasks[args.task]()
    task.given(args)
    return study.main(rest, task, __doc__)


if __name__ == "__main__":
    sys.exit(main())
