"""The exercises: unlike right solutions pass, and each of many wrong ones is told what it broke.

A wrong solution is the first right one of its exercise with one piece of text changed, and comes with words of the
sentence that it must get, so that no other fault is named.
"""

import pytest
from conftest import ROOT

import exercises

RIGHT = {
    "split": ["""
def split(chosen, length, eos, rng):
    n = len(chosen) - (chosen[-1] in eos)
    size = min(length, n)
    start = int(rng.integers(0, n - size + 1))
    return start, start + size
""", """
def split(chosen, length, eos, rng):
    end = len(chosen) - 1 if chosen[-1] in set(eos) else len(chosen)
    cuts = [(i, i + length) for i in range(end) if i + length <= end] or [(0, end)]
    return rng.choice(cuts)
""", """
def split(chosen, length, eos, rng):
    body = chosen[:-1] if chosen[-1] in eos else chosen
    places = max(1, len(body) - length + 1)
    start = int(rng.random() * places)
    return [start, min(start + length, len(body))]
"""],
    "splice": ["""
def splice(chosen, start, stop, new, eos):
    A, C = chosen[:start], chosen[stop:]
    return A + new + ([] if new[-1] in eos else C)
""", """
def splice(chosen, start, stop, new, eos):
    rejected = list(chosen)
    rejected[start:stop] = new
    if set(new) & set(eos):
        del rejected[start + len(new):]
    return rejected
""", """
import itertools
import numpy as np

def splice(chosen, start, stop, new, eos):
    parts = [chosen[:start], new]
    while new[-1] not in eos:
        parts.append(chosen[stop:])
        break
    return np.array(list(itertools.chain(*parts)))
"""],
    "Queue": ["""
class Queue:
    def __init__(self, capacity):
        self.pairs, self.capacity = [], capacity

    def __len__(self):
        return len(self.pairs)

    def add(self, pair):
        self.pairs.append(pair)
        if len(self.pairs) > self.capacity:
            self.pairs.pop(0)

    def sample(self, n, rng):
        if n > len(self.pairs):
            raise ValueError("too few")
        return [self.pairs[i] for i in rng.choice(len(self.pairs), n, replace=False)]
""", """
from collections import deque

class Queue:
    def __init__(self, capacity):
        self.pairs = deque(maxlen=capacity)

    __len__ = lambda self: len(self.pairs)

    def add(self, pair):
        self.pairs.append(pair)

    def sample(self, n, rng):
        order = rng.permutation(len(self.pairs))
        if n > len(order):
            raise ValueError(n)
        return tuple(self.pairs[i] for i in order[:n])
""", """
class Queue:
    def __init__(self, capacity):
        self.ring, self.added = [None] * capacity, 0

    def __len__(self):
        return min(self.added, len(self.ring))

    def add(self, pair):
        self.ring[self.added % len(self.ring)] = pair
        self.added += 1

    def sample(self, n, rng):
        left = list(self.ring[:len(self)])
        if n > len(left):
            raise ValueError("too few")
        for i in range(n):
            j = int(rng.integers(i, len(left)))
            left[i], left[j] = left[j], left[i]
        return left[:n]
"""],
    "log_odds": ["""
import torch

def log_odds(logp):
    near = logp > -0.5
    a = torch.log(-torch.expm1(torch.where(near, logp, -1.0)))
    b = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))
    return logp - torch.where(near, a, b)
""", """
import torch

def log_odds(logp):
    return -torch.log(torch.expm1(-logp))
""", """
import torch

def log_odds(logp):
    wide = logp.double()
    return (wide - torch.log1p(-wide.exp())).float()
"""],
    "dpo_loss": ["""
import torch
import torch.nn.functional as F

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin)
""", """
import torch.nn.functional as F

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    return F.softplus(beta * (rejected - chosen) - beta * (ref_rejected - ref_chosen))
""", """
import torch

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return torch.logaddexp(up, down) - up
"""],
    "ema_update": ["""
import copy
import torch

@torch.no_grad()
def ema_update(ema, policy, alpha):
    for old, new in zip(ema.parameters(), policy.parameters()):
        old.lerp_(new, 1 - alpha)
""", """
import torch

def ema_update(ema, policy, alpha):
    theirs = dict(policy.named_parameters())
    for name, p in ema.named_parameters():
        p.data = alpha * p.data + (1 - alpha) * theirs[name].detach()
    return ema
""", """
import torch

def ema_update(ema, policy, alpha):
    old, new = ema.state_dict(), policy.state_dict()
    ema.load_state_dict({name: old[name].mul(alpha).add(new[name], alpha=1 - alpha) for name in old})
"""],
    "labels": ["""
def labels(prompt, response, width):
    row = prompt + response
    here = [-100] * (len(prompt) - 1)
    here += response
    return here + [-100] * (width - len(here))
""", """
def labels(prompt, response, width):
    row, out = prompt + response, []
    for t in range(width):
        is_response = len(prompt) <= t + 1 < len(row)
        out.append(row[t + 1] if is_response else -100)
    return out
""", """
import torch

def labels(prompt, response, width):
    ids = torch.full((width + 1,), -100)
    ids[len(prompt):len(prompt) + len(response)] = torch.tensor(response)
    return ids.roll(-1)[:width]
"""]}

WRONG = {           # exercise: (text of its first right solution, what it becomes, words of the sentence)
    "split": [
        ("n - size + 1", "max(1, n - size)", "leaves its upper bound out"),
        ("len(chosen) - (chosen[-1] in eos)", "len(chosen)", "holds the end token"),
        ("len(chosen) - (chosen[-1] in eos)", "len(chosen) - 1", "without an end token the last token may be in B"),
        ("(chosen[-1] in eos)", "(chosen[-1] == eos[0])", "holds the end token"),
        ("min(length, n)", "length", "no longer than the segment is rewritten whole"),
        ("return start, start + size", "return start, size", "the first place behind B"),
        ("return start, start + size", "return start, start + size - 1", "the first place behind B"),
        ("rng.integers(0,", "__import__('numpy').random.randint(0,", "chance must come from `rng` alone"),
        ("int(rng.integers(0, n - size + 1))", "0", "is never drawn"),
        ("int(rng.integers(0, n - size + 1))", "min(int(rng.integers(0, n - size + 1)) for _ in 'ab')", "equally likely"),
        ("rng.integers(0,", "rng.integers(n > size,", "the first of"),
        ("    size =", "    del chosen[n:]\n    size =", "y+ was changed"),
        ("return start, start + size", "return chosen[start:start + size]", "return two numbers")],
    "splice": [
        ("([] if new[-1] in eos else C)", "C", "after an end token comes nothing"),
        ("([] if new[-1] in eos else C)", "[]", "C is missing"),
        ("new[-1] in eos", "new[-1] == eos[0]", "7, which is in `eos` too"),
        ("new[-1] in eos", "chosen[-1] in eos", "C is missing"),
        ("chosen[stop:]", "chosen[start + len(new):]", "B' is shorter than B"),
        ("chosen[stop:]", "chosen[start:]", "after B' comes C"),
        ("chosen[stop:]", "chosen[stop + 1:]", "after B' comes C"),
        ("chosen[:start]", "chosen[:stop]", "B is still there"),
        ("return A + new", "return new", "y- begins with A"),
        ("    return A", "    new = new[:stop - start]\n    return A", "all of B'"),
        ("    A, C", "    new = [t for t in new if t not in eos] or new\n    A, C", "all of B'"),
        ("    return A + new +", "    chosen[start:stop] = new\n    return A + new +", "y+ or B' was changed"),
        ("else C)", "else C + ([] if C else [eos[0]]))", "closed by anybody else")],
    "Queue": [
        ("pop(0)", "pop(-2)", "the oldest leaves"),
        ("pop(0)", "pop()", "the oldest leaves"),
        ("        if len(self.pairs) > self.capacity:\n            self.pairs.pop(0)\n", "", "at most `capacity`"),
        ("> self.capacity", ">= self.capacity", "exactly one leaves"),
        ("self.pairs.pop(0)", "self.pairs = self.pairs[-1:]", "exactly one leaves"),
        ("replace=False", "replace=True", "without replacement"),
        ("rng.choice(len(self.pairs), n, replace=False)", "range(len(self.pairs) - n, len(self.pairs))", "equally likely"),
        ("return [self.pairs[i] for i", "return [i for i", "the pairs themselves"),
        ("return [self.pairs[i] for i in rng.choice(len(self.pairs), n, replace=False)]",
         "return [self.pairs.pop(rng.integers(len(self.pairs))) for _ in range(n)]", "a drawn pair left the queue"),
        ("rng.choice", "__import__('numpy').random.choice", "chance must come from `rng` alone"),
        ("        self.pairs, self.capacity = [], capacity", "        self.capacity = capacity\n\n    pairs = []", "not to the class"),
        ("        self.pairs.append(pair)", "        self.pairs += [pair] * (pair not in self.pairs)", "two equal pairs are two"),
        ("raise ValueError(\"too few\")", "n = len(self.pairs)", "no ValueError")],
    "log_odds": [
        ("return logp - torch.where(near, a, b)", "return logp - torch.log(1 - logp.exp())", "torch.expm1 keeps them"),
        ("return logp - torch.where(near, a, b)", "return torch.where(near, a, b) - logp", "the sign is turned"),
        ("return logp - ", "return -", "the log odds are"),
        ("return logp - ", "return logp + ", "the log odds are"),
        ("return logp - torch.where(near, a, b)", "return logp.exp() / -torch.expm1(logp)", "the log odds are"),
        ("return logp - torch.where(near, a, b)", "return torch.logit(logp.exp())", "the log odds are"),
        ("return logp - torch.where(near, a, b)", "return torch.log(logp / (1 - logp))", "the log odds are"),
        ("torch.where(near, a, b)", "torch.where(near, a, b) / 2.302585", "the log odds are"),
        ("return logp - torch.where(near, a, b)", "return (logp - torch.where(near, a, b)).detach()", "has no gradient"),
        ("return logp - torch.where(near, a, b)", "return (logp - torch.where(near, a, b)).mean()", "one value for each"),
        ("b = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))", "b = torch.log1p(-torch.exp(logp))", "both of its branches"),
        ("logp - torch.where(near, a, b)", "logp.clamp(max=-1e-4) - torch.log(-torch.expm1(logp.clamp(max=-1e-4)))", "the log odds are"),
        ("return logp - torch.where(near, a, b)", "return torch.where(near, a, b).detach() * -1 + logp", "the gradient is")],
    "dpo_loss": [
        ("(chosen - ref_chosen) - (rejected - ref_rejected)", "(rejected - ref_rejected) - (chosen - ref_chosen)", "changed places"),
        ("(rejected - ref_rejected)", "(rejected + ref_rejected)", "ln 2"),
        ("(chosen - ref_chosen) - (rejected - ref_rejected)", "chosen - rejected", "ln 2"),
        ("margin = beta * (", "margin = (", "beta is missing"),
        ("margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))\n    return -",
         "margin = (chosen - ref_chosen) - (rejected - ref_rejected)\n    return -beta * ", "not the loss"),
        ("-F.logsigmoid(margin)", "-torch.log(torch.sigmoid(margin))", "logsigmoid (or softplus)"),
        ("-F.logsigmoid(margin)", "-F.logsigmoid(margin).mean()", "one loss a pair"),
        ("-F.logsigmoid(margin)", "-F.logsigmoid(margin).mean(0, keepdim=True)", "three losses"),
        ("-F.logsigmoid(margin)", "F.logsigmoid(margin)", "ln 2"),
        ("-F.logsigmoid(margin)", "torch.sigmoid(-margin)", "ln 2"),
        ("-F.logsigmoid(margin)", "-F.logsigmoid(margin.detach())", "no gradient"),
        ("margin = beta * (", "margin = beta / 2 * (", "it is -log sigmoid"),
        ("(rejected - ref_rejected)", "(rejected - ref_rejected) * 2", "it is -log sigmoid"),
        ("-F.logsigmoid(margin)", "torch.log(1 + torch.exp(-margin))", "logsigmoid (or softplus)")],
    "ema_update": [
        ("1 - alpha", "alpha", "alpha weighs the OLD one"),
        ("old.lerp_(new, 1 - alpha)", "old = alpha * old + (1 - alpha) * new", "gives a name"),
        ("old.lerp_(new, 1 - alpha)", "new.lerp_(old, alpha)", "the policy was changed"),
        ("@torch.no_grad()\n", "", "work under torch.no_grad()"),
        ("old.lerp_(new, 1 - alpha)", "old.mul_(alpha).add_(new)", "the two shares"),
        ("old.lerp_(new, 1 - alpha)", "old.lerp_(new, 0.5)", "the two shares"),
        ("old.lerp_(new, 1 - alpha)", "old.lerp_(new, 1 - alpha)\n        old.lerp_(new, 1 - alpha)", "the two shares"),
        ("        old.lerp_", "        if old.dim() > 1: old.lerp_", "biases and all layers"),
        ("old.lerp_(new, 1 - alpha)", "old.lerp_(new, 1 - alpha)\n        break", "biases and all layers"),
        ("old.lerp_(new, 1 - alpha)", "old.data = new.data if alpha == 0 else old.lerp(new, 1 - alpha)", "share a tensor"),
        ("old.lerp_(new, 1 - alpha)", "old.copy_(old.bfloat16().lerp(new.bfloat16(), 1 - alpha) if (new - old).abs().max() < 0.1 else old.lerp(new, 1 - alpha))", "half precision"),
        ("    for old, new in zip(ema.parameters(), policy.parameters()):", "    ema = copy.deepcopy(ema)\n    for old, new in zip(ema.parameters(), policy.parameters()):", "did not move")],
    "labels": [
        ("[-100] * (len(prompt) - 1)", "[-100] * len(prompt)", "the token AFTER its place"),
        ("[-100] * (len(prompt) - 1)", "[-100] * max(0, len(prompt) - 2)", "asked to predict"),
        ("[-100] * (len(prompt) - 1)", "prompt[1:]", "asked to predict"),
        ("here += response", "here += [-100] + response[1:]", "predicts the first token of the response"),
        ("here += response", "here += response[:-1]", "its end token too"),
        ("here += response", "here += [t if t != 2 else -100 for t in response]", "its end token too"),
        ("here += response", "here += [t or -100 for t in response]", "predicts the first token of the response"),
        ("[-100] * (width - len(here))", "[0] * (width - len(here))", "nor in the padding"),
        ("[-100] * (width - len(here))", "[row[0]] + [-100] * (width - len(here) - 1)", "nothing is known"),
        ("return here + [-100] * (width - len(here))", "return here", "one for each token of the row"),
        ("return here + [-100] * (width - len(here))", "return here + [-100] * (width - len(here) - 1)", "one for each token of the row"),
        ("here += response", "here += [row[len(prompt) - 1]] + response[:-1]", "predicts the first token"),
        ("here += response", "here = row[1:]", "asked to predict"),
        ("return here + ", "return ' '.join(map(str, here)) + ' ' + '-100 ' * (width - len(here)) or ", "whole numbers")]}


def built(name, source):
    found = {}
    exec(source, found)
    return found[name]


def test_every_exercise_has_three_right_solutions_and_ten_wrong_ones():
    assert list(RIGHT) == list(WRONG) == list(exercises.EXERCISES)
    assert all(len(set(RIGHT[name])) >= 3 and len(set(WRONG[name])) >= 10 for name in RIGHT)


@pytest.mark.parametrize("name, source", [(name, source) for name, sources in RIGHT.items() for source in sources])
def test_a_right_solution_passes(name, source):
    assert exercises.mark(name, built(name, source)) == ""


@pytest.mark.parametrize("name, old, new, words", [(name, *wrong) for name, rows in WRONG.items() for wrong in rows])
def test_a_wrong_solution_is_told_why_in_a_sentence(name, old, new, words):
    source = RIGHT[name][0]
    assert source.count(old) == 1
    sentence = exercises.mark(name, built(name, source.replace(old, new)))
    assert words in sentence and len(sentence) < 330 and "\n" not in sentence and "tensor(" not in sentence, sentence


@pytest.fixture
def marked(capsys):
    """marked(file): exit code and what is printed."""
    return lambda path: (exercises.main([str(path)]), *capsys.readouterr())


def test_the_empty_exercises_are_not_written_yet(marked):
    code, said, _ = marked(ROOT / "docs/exercises.py")
    assert code == 1 and said.count("not written yet") == 7 and "0 of 7" in said


def test_a_file_of_right_solutions_is_right_and_one_that_is_no_python_is_refused(tmp_path, marked):
    path = tmp_path / "mine.py"
    path.write_text("\n".join(sources[1] for sources in RIGHT.values()), "utf-8")
    code, said, _ = marked(path)
    assert code == 0 and "7 of 7" in said
    path.write_text(RIGHT["split"][0] + "\nsplice = 3\n", "utf-8")
    code, said, _ = marked(path)
    assert code == 1 and "there is no Queue" in said and "1 of 7" in said
    path.write_text("def split(:\n", "utf-8")
    code, _, said = marked(path)
    assert code == 2 and len(said.splitlines()) == 1 and "line 1" in said


def test_the_first_call_brings_the_empty_exercises_and_the_next_marks_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercises, "MINE", tmp_path / "runs/exercises.py")
    assert exercises.main([]) == 0 and (tmp_path / "runs/exercises.py").read_bytes() == (ROOT / "docs/exercises.py").read_bytes()
    assert exercises.main([]) == 1 and "0 of 7" in capsys.readouterr().out
