"""Marks the seven exercises of docs/exercises.py: any right solution passes, and a wrong one is told why in a sentence.

    python tools/exercises.py           marks runs/exercises.py; copies the empty exercises there first if it is not there
    python tools/exercises.py FILE      marks another file

Exit code 0 if all are right, 1 if not, 2 if there is nothing to mark. Left out: a limit on time; Ctrl-C stops an endless loop.
"""

import argparse
import math
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
STUBS, MINE = ROOT / "docs/exercises.py", ROOT / "runs/exercises.py"
EOS = (2, 7)                # more than one token may end an answer


class Wrong(Exception):
    """A solution does not keep its promise; the message says in a sentence what it broke."""


def want(kept, sentence):
    if not kept:
        raise Wrong(sentence)


def ids(value, what):
    """A list, tuple, array or tensor of whole numbers as a list of int."""
    try:
        found = [int(x) for x in value]
        want(all(x == y for x, y in zip(found, value)), f"{what} must hold whole numbers")
        return found
    except (TypeError, ValueError):
        raise Wrong(f"{what} must be a list of whole numbers, not {type(value).__name__}") from None


def called(function, arguments, case):
    """function(*arguments), where an exception is told with the case in which it came."""
    try:
        return function(*arguments)
    except (NotImplementedError, Wrong):
        raise
    except Exception as error:
        raise Wrong(f"{case}, it raises {type(error).__name__}: {' '.join(str(error).split())[:100]}") from error


def even(counts, expected):
    """Whether counts are within ten standard deviations of what chance gives around `expected`: a right solution, which
    may use up its random numbers as it likes, is called wrong once in some hundred thousand times."""
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    return statistic < len(counts) - 1 + 10 * math.sqrt(2 * (len(counts) - 1))


# ------------------------------------------------------------------------------------------------ the exercises

def check_split(split):
    for n, length, end in ((9, 4, 2), (9, 4, 7), (9, 4, None), (5, 9, 2), (6, 6, 2), (1, 1, 7), (4, 1, None)):
        chosen = list(range(100, 100 + n)) + [end] * (end is not None)
        given, k, size = list(chosen), n - min(length, n) + 1, min(length, n)
        case = f"with {n} tokens{f' and the end token {end}' if end else ', truncated'}, and a segment of {length}"
        whole = " (a y+ that is no longer than the segment is rewritten whole)" if length >= n else ""
        rng, cuts = np.random.default_rng(n), Counter()
        for _ in range(200 * k):
            cut = called(split, (chosen, length, EOS, rng), case + whole)
            found = ids(cut, "(start, stop)")
            want(len(found) == 2, f"return two numbers, (start, stop), not {len(found)}")
            start, stop = found
            want(chosen == given, "y+ was changed: a caller still needs it, so work on a copy or on its length")
            want(start >= 0, f"{case}, B starts at {start}, before y+ does{whole}")
            want(end is None or stop <= n, f"{case}, B is [{start}:{stop}] and holds the end token, which belongs to C: only a token of `eos` may end y-")
            want(stop <= n, f"{case}, B stops at {stop}, behind the end of y+{whole}")
            want(stop - start == size, f"{case}, B = [{start}:{stop}] has {stop - start} tokens and not {size}: `stop` is the first place behind B{whole}")
            cuts[start] += 1
        for place, name in ((k - 1, "last"), (0, "first")):
            hint = ("; numpy's `integers` leaves its upper bound out" if place else "") + (", and without an end token the last token may be in B" if end is None else "")
            want(cuts[place], f"{case}, the {name} of {k} places, {place}, is never drawn: that part of y+ would never be rewritten{hint}")
        want(k == 1 or even([cuts[i] for i in range(k)], 200),
             f"{case}, the {k} places come {[cuts[i] for i in range(k)]} times: all cuts must be equally likely")
    twice = [[ids(split(list(range(50)), 3, EOS, rng), "(start, stop)") for _ in range(20)] for rng in map(np.random.default_rng, (5, 5))]
    want(twice[0] == twice[1], "two generators with one seed give different cuts: chance must come from `rng` alone, or no run can be repeated")


def check_splice(splice):
    y = [11, 12, 13, 14, 15, 16, 2]
    for start, stop, new, what in (
            (2, 4, [91, 92], ""), (2, 4, [91], "B' is shorter than B here"), (0, 3, [91, 92, 93], "A is empty here"),
            (1, 4, [91, 92, 93, 94, 95], "B' is longer than B here"), (2, 7, [91, 92, 93], "C is empty here, and y- is not closed by anybody else"),
            (3, 6, [91, 92, 2], "B' ended the answer with 2"), (3, 6, [91, 7], "B' ended the answer with 7, which is in `eos` too")):
        ended = new[-1] in EOS
        A, B, C = y[:start], y[start:stop], y[stop:]
        case, given = f"with A {A}, B {B}, C {C} and B' {new}", (list(y), list(new))
        got = ids(called(splice, (given[0], start, stop, given[1], EOS), case), "y-")
        want(given == (y, new), "y+ or B' was changed: y- is a new list, and y+ is still needed")
        note = f" ({what})" if what else ""
        wrong = f"{case}, y- is {got}"
        want(got[:start] == A, f"{wrong}: y- begins with A, as y+ does{note}")
        rest = got[start:]
        want(rest[:len(B)] != B, f"{wrong}: B is still there, but B' takes its place")
        want(rest[:len(new)] == new, f"{wrong}: after A comes all of B'{note}")
        after = rest[len(new):]
        if ended:
            want(not after, f"{wrong}: after an end token comes nothing, so C is left out{note}")
        want(ended or after or not C, f"{wrong}: C is missing{note}")
        want(ended or after == C, f"{wrong}: after B' comes C = y+[stop:], and nothing else{note}")


def check_queue(Queue):
    def filled(n, capacity):
        queue = called(Queue, (capacity,), f"Queue({capacity})")
        for i in range(n):
            called(queue.add, (f"pair {i}",), f"when pair {i} is added to a queue of {capacity}")
            want(len(queue) <= capacity, f"after {i + 1} pairs a queue of {capacity} holds {len(queue)}: at most `capacity` may wait")
            want(len(queue) == min(i + 1, capacity), f"after {i + 1} pairs a queue of {capacity} holds {len(queue)}, not {min(i + 1, capacity)}: "
                 "exactly one leaves for each that comes, once it is full")
        return queue

    def drawn(queue, n, rng):
        got = list(called(queue.sample, (n, rng), f"when {n} pairs are drawn from {len(queue)}"))
        want(len(got) == n, f"{n} pairs were asked for, and {len(got)} came")
        want(all(isinstance(p, str) for p in got), f"sample returns the pairs themselves, not {got[0]!r:.40}")
        return got

    one, other = (called(Queue, (3,), "Queue(3)") for _ in range(2))
    called(one.add, ("pair 0",), "when a pair is added to a queue of 3")
    want(len(other) == 0, "two queues share their pairs: the list belongs to the object (self), not to the class")
    rng = np.random.default_rng(0)
    for n, capacity in ((3, 5), (13, 5), (1, 1), (3, 1), (10, 5)):
        queue = filled(n, capacity)
        got, there = sorted(drawn(queue, len(queue), rng)), sorted(f"pair {i}" for i in range(max(0, n - capacity), n))
        want(len(set(got)) == len(got), f"one draw has {got}: no pair may come twice in it, so draw without replacement")
        want(got == there, f"after {n} pairs a queue of {capacity} holds {', '.join(got)}: the oldest leaves, and {', '.join(there)} stay")
    queue = filled(7, 7)
    before = len(queue)
    drawn(queue, 3, rng)
    want(len(queue) == before, "a drawn pair left the queue: it stays until it is the oldest, and may be drawn again")
    counts = Counter(p for _ in range(2000) for p in drawn(queue, 2, rng))
    seen = [counts[f"pair {i}"] for i in range(7)]
    want(even(seen, 4000 / 7), f"drawn {seen} times, oldest first: all pairs must be equally likely, or the policy learns from some of them only")
    twice = [[drawn(filled(30, 30), 5, rng) for _ in range(4)] for rng in map(np.random.default_rng, (3, 3))]
    want(twice[0] == twice[1], "two generators with one seed draw different pairs: chance must come from `rng` alone")
    for pair in ("pair 0", "pair 0"):
        other.add(pair)
    want(len(other) == 2, "an equal pair was not added: two equal pairs are two pairs")
    try:
        other.sample(3, rng)
    except ValueError:
        return
    raise Wrong("3 pairs were asked of a queue that holds 2, and no ValueError came: a batch must not shrink unseen")


def check_log_odds(log_odds):
    values = [-1e-8, -1e-6, -1e-3, -0.1, -math.log(2), -1.0, -3.0, -20.0, -80.0]
    for x in values:
        logp = torch.tensor([x, x], dtype=torch.float32, requires_grad=True)
        real = float(logp.detach()[0])                        # as float32 has it
        right, slope = real - math.log(-math.expm1(real)), -1 / math.expm1(real)
        case = f"at log p = {x:g}"
        got = called(log_odds, (logp,), case)
        want(isinstance(got, torch.Tensor) and got.shape == logp.shape, "return a tensor of the same shape: one value for each log p")
        value = float(got.detach()[0])
        naive = " (1 - exp(log p) has lost its digits; torch.expm1 keeps them)" if x > -1e-2 else ""
        want(not abs(value + right) <= 1e-3 * abs(right) or abs(right) < 1e-3, f"{case} the log odds are {right:.4f}, and you have {value:.4f}: the sign is turned; p belongs above, 1 - p below")
        want(math.isfinite(value) and abs(value - right) <= 1e-3 * max(1, abs(right)), f"{case} the log odds are {right:.4f}, and you have {value:.4f}{naive}")
        want(got.requires_grad, "the result has no gradient: stay within torch, without detach, item or float, for ORPO learns through it")
        grad, = called(torch.autograd.grad, (got.sum(), logp), case)
        first = float(grad[0])
        where = "; where() goes backward through both of its branches, so give each only what it can take" if not math.isfinite(first) else ""
        want(abs(first - slope) <= 1e-3 * slope, f"{case} the gradient is {slope:.4g}, and yours is {first:.4g}{where}")


def check_dpo(dpo_loss):
    def loss(c, r, rc, rr, beta):
        x = beta * ((c - rc) - (r - rr))
        return math.log1p(math.exp(-x)) if x > -30 else -x

    first = called(dpo_loss, (*torch.tensor([[-5.0], [-9.0], [-5.0], [-9.0]]), 0.3), "where policy and reference agree")
    want(isinstance(first, torch.Tensor) and first.shape == (1,), "return one loss a pair, a tensor (n,)")
    want(abs(float(first) - 0.3 * math.log(2)) > 1e-4, "where policy and reference agree the loss is ln 2, whatever beta is: it scales the gap inside of the sigmoid, not the loss")
    want(abs(float(first) - math.log(2)) < 1e-4, f"where the policy is its own reference the loss is ln 2 = 0.6931, whatever the texts are, and you have "
         f"{float(first):.4f}: compare how far each text has moved from the reference")
    rows = [(-10.0, -30.0, -12.0, -25.0), (-30.0, -12.0, -28.0, -20.0), (-50.0, -40.0, -40.0, -45.0)]
    got = called(dpo_loss, (*torch.tensor(rows).T, 0.1), "with three pairs")
    want(got.shape == (3,), f"three pairs have three losses, and you have the shape {tuple(got.shape)}: the mean is taken later, over micro-batches")
    for row, value in zip(rows, got.tolist()):
        c, r, rc, rr = row
        right, other = loss(*row, 0.1), loss(r, c, rr, rc, 0.1)
        case = f"with log-probs {c:g} and {r:g}, reference {rc:g} and {rr:g}, beta 0.1, the loss is {right:.4f}, and you have {value:.4f}"
        want(value > 0 or right < 0, f"{case}: a negative log of a probability is not negative; where is the minus?")
        want(abs(value - other) > 1e-3 or abs(right - other) < 1e-3, f"{case}: chosen and rejected have changed places, so y+ is pushed down")
        want(abs(value - loss(*row, 1.0)) > 1e-3, f"{case}: beta is missing; it scales the gap inside of the sigmoid")
        want(abs(value - right) < 1e-3, f"{case}: it is -log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected)])")
    for gap in (2000.0, -2000.0):
        c = torch.tensor([gap], requires_grad=True)
        value = called(dpo_loss, (c, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0), f"with a gap of {gap:g} nats")
        want(math.isfinite(float(value.detach())) and abs(float(value.detach()) - max(0.0, -gap)) < 1, f"with a gap of {gap:g} nats the loss is {max(0, -gap):g}, and you have "
             f"{float(value.detach()):g}: sigmoid is 0 there, and its log infinite; logsigmoid (or softplus) is both in one")
        want(value.requires_grad, "the result has no gradient: stay within torch, without detach or item")
        slope, = torch.autograd.grad(value.sum(), c)
        want(math.isfinite(float(slope)), f"with a gap of {gap:g} nats the gradient is {float(slope):g}, not finite; logsigmoid has one everywhere")


def check_ema(ema_update):
    def pair():
        rng = torch.Generator().manual_seed(1)
        both = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
        for p in (p for model in both for p in model.parameters()):
            p.data = torch.randn(p.shape, generator=rng)
        return both[0].requires_grad_(False), both[1]

    flat = lambda model: torch.cat([p.detach().double().flatten() for p in model.parameters()])
    for alpha in (0.9, 0.25, 0.0, 1.0):
        ema, policy = pair()
        old, new = flat(ema), flat(policy)
        called(ema_update, (ema, policy, alpha), f"with alpha {alpha}")
        got, right = flat(ema), alpha * old + (1 - alpha) * new
        same = lambda other: torch.allclose(got, other, atol=1e-5)
        want(torch.equal(flat(policy), new), "the policy was changed: only the EMA moves")
        want(not same(old) or same(right), f"with alpha {alpha} the EMA did not move: change its tensors in place (`p = ...` only gives a name to a new one)")
        want(not same((1 - alpha) * old + alpha * new) or same(right), f"with alpha {alpha} the new weights count {alpha} and the old EMA {1 - alpha:g}: alpha weighs the OLD one")
        want(all(not p.requires_grad for p in ema.parameters()), "the EMA has become part of the policy's graph and wants a gradient: work under torch.no_grad()")
        moved = [torch.allclose(p, alpha * o + (1 - alpha) * n, atol=1e-5) for p, o, n in zip(ema.parameters(), pair()[0].parameters(), policy.parameters())]
        want(all(moved) or not any(moved), f"only {sum(moved)} of {len(moved)} parameters are right: biases and all layers belong to theta")
        want(same(right), f"with alpha {alpha} a weight that was {old[0]:.4f}, of a policy that has {new[0]:.4f}, is {got[0]:.4f} and not {right[0]:.4f}: the two shares are alpha and 1 - alpha")
        with torch.no_grad():
            next(policy.parameters()).add_(1.0)
        want(torch.equal(flat(ema), got), "the EMA and the policy share a tensor now, so that every step of the policy moves both: copy values, not references")
    ema, policy = pair()
    for p, q in zip(ema.parameters(), policy.parameters()):
        p.data, q.data = torch.ones_like(p), torch.full_like(q, 1.0001)
    for _ in range(50):
        ema_update(ema, policy, 0.5)
    want(abs(float(flat(ema).mean()) - 1.0001) < 2e-5, "a policy that is 0.0001 away is never reached: small steps are lost in half precision, so keep the EMA in its own float32")


def check_labels(labels):
    for prompt, response, width, what in (
            ([5, 6, 8], [21, 22, 2], 6, ""), ([5, 6, 8], [21, 22, 2], 9, " (three tokens of padding)"), ([5], [21], 4, " (a prompt and a response of one token)"),
            ([5, 2, 6], [21, 22], 6, " (2 ends the prompt's first turn)"), ([5, 6], [0, 22, 0, 2], 7, " (0 is a token like any other)"), ([5, 9, 9], [9, 9, 2], 6, " (prompt and response look alike)")):
        row = prompt + response
        right = [-100] * width
        for t in range(len(prompt) - 1, len(row) - 1):
            right[t] = row[t + 1]
        case = f"with prompt {prompt}, response {response} and width {width}{what}"
        got = ids(called(labels, (list(prompt), list(response), width), case), "the labels")
        wrong = f"{case} you have {got}, not {right}"
        want(len(got) == width, f"{case} there are {len(got)} labels: one for each token of the row, padding too")
        if got != right:
            where = next(t for t in range(width) if got[t] != right[t])
            if got[len(prompt):len(row)] == response:
                reason = "a label is the token AFTER its place; unshifted, the model learns to repeat what it reads"
            elif where < len(prompt) - 1:
                reason = "the prompt is given, nobody is asked to predict it"
            elif where == len(prompt) - 1:
                reason = "the prompt's last token predicts the first token of the response"
            elif where >= len(row) - 1:
                reason = "after the last token of the response nothing is known, so nothing is scored there, nor in the padding"
            else:
                reason = "each token of the response, its end token too, is the label of the place before it"
            raise Wrong(f"{wrong}: {reason}")


EXERCISES = {       # name in the file: what marks it
    "split": check_split, "splice": check_splice, "Queue": check_queue, "log_odds": check_log_odds, "dpo_loss": check_dpo,
    "ema_update": check_ema, "labels": check_labels}


def mark(name, solution):
    """'' if a solution is right, else a sentence that says why not."""
    try:
        EXERCISES[name](solution)
        return ""
    except NotImplementedError:
        return "not written yet"
    except Wrong as reason:
        return str(reason)
    except Exception as error:                           # of something that is neither a function nor a class, say
        return f"it raises {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("file", nargs="?", type=Path, help="your solutions; runs/exercises.py without it")
    path = parser.parse_args(argv).file
    if path is None and not MINE.exists():
        MINE.parent.mkdir(exist_ok=True)
        shutil.copy(STUBS, MINE)
        print("Seven empty exercises are in runs/exercises.py now. Write, and run this command again to have them marked.")
        return 0
    path = path or MINE
    try:
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        print(f"exercises: {path}{line} cannot be read as Python: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    right = 0
    for i, name in enumerate(EXERCISES, 1):
        sentence = mark(name, found[name]) if name in found else f"there is no {name} in {path.name}"
        right += not sentence
        print(f"{i}  {name:11} {sentence or 'right'}")
    print(f"{right} of {len(EXERCISES)} are right")
    return 0 if right == len(EXERCISES) else 1


if __name__ == "__main__":
    sys.exit(main())
