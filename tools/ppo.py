"""PPO on the tiny world: what a reward buys, and what it costs.

    python tools/ppo.py --seed 1                          from a base of this seed, made if it is not there
    python tools/ppo.py --model FOLDER --out runs/ppo     from a model folder; leaves metrics.jsonl and model/

A step lets the policy answer training prompts, `group` times each, at temperature 1. The reward is 1 where the verifier
passes an answer, else 0. All tokens of an answer share one advantage: its reward beside those of the other
answers to its prompt. So there is no value head. No y+ is looked at. Left out: a learned reward model, schedules, resuming, GPUs.
"""

import argparse
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

import torch
import measure       # which finds the modules below
from buffer import Pair, collate
from losses import batch_logps, by_text
from machine.folders import companions, save_pretrained
from machine.report import passes, table_text
from model import generate, twin
from sapo import optimizer_step


@dataclass
class Settings:             # each is a flag
    model: str = ""         # folder to start from
    out: str = ""           # a folder to write
    seed: int = 1
    split: str = "test"     # held-out rows: test or validation
    steps: int = 40         # batches of answers
    prompts: int = 16       # a step
    group: int = 8          # answers to each prompt
    tokens: int = 80        # of an answer, at most
    epochs: int = 3         # over a step's answers
    minibatch: int = 32     # answers an update
    clip: float = 0.2       # eps of equation 7
    beta: float = 0.02      # of the KL penalty
    lr: float = 1e-4        # Adam's


def surrogate(logps, old, advantages, clip):
    """min(r A, clip(r, 1 - eps, 1 + eps) A) of each token, to be raised (PPO, arXiv 1707.06347, equation 7), and where the
    clipped term is the smaller one, so that the token has no gradient (bool): both (R, T). logps, old: (R, T) log-probs of
    the policy now and when it answered, r = exp(logps - old); advantages: (R, 1)."""
    ratio = (logps - old).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(free, clipped), clipped < free


def group_advantages(rewards):
    """(P, K) rewards of K answers to each prompt, less their mean, over their standard deviation (GRPO, arXiv 2402.03300,
    section 4.1.2): (P, K). Where all K are equal it is 0, and such a group teaches nothing."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)


def kl_penalty(logps, reference):
    """k3 of Schulman's "Approximating KL Divergence" (2020): q - 1 - log q of each token, with q = pi_ref / pi; never
    negative, and 0 where both agree. Its mean over tokens drawn from pi is KL(pi, pi_ref). (R, T) from two (R, T)."""
    return torch.expm1(reference - logps) - (reference - logps)


def ppo_step(policy, reference, optimizer, examples, reward, s, eos, rng, vocab=None):
    """A batch of answers and all updates on it. reward(example, answer): a number; s: Settings. Returns metrics; kl is in
    nats an answer, before the updates; clipped is the share of tokens without a gradient; trained counts prompts too."""
    asked = [e for e in examples for _ in range(s.group)]
    answers = generate(policy, [e.prompt for e in asked], [s.tokens] * len(asked), eos, rng=rng, vocab=vocab)
    rewards = torch.tensor([float(reward(e, answer)) for e, answer in zip(asked, answers)]).view(-1, s.group)
    advantages, pairs = group_advantages(rewards).flatten(), [Pair(e.prompt, a, []) for e, a in zip(asked, answers)]
    parts, clipped = torch.randperm(len(pairs), generator=rng).split(s.minibatch), []
    batches = [collate([pairs[i] for i in part], share=False, sides=1) for part in parts]      # answers in y+'s place
    with torch.no_grad():
        old, frozen = [[by_text(batch_logps(model, batch), batch) for batch in batches] for model in (policy, reference)]
    for epoch in range(s.epochs):
        for i in torch.randperm(len(batches), generator=rng):
            logps, answered = (by_text(v, batches[i]) for v in (batch_logps(policy, batches[i]), batches[i].scored))  # (R, T)
            gain, stopped = surrogate(logps, old[i], advantages[parts[i], None], s.clip)
            optimizer.zero_grad(set_to_none=True)
            (s.beta * kl_penalty(logps, frozen[i]) - gain)[answered].mean().backward()         # over tokens, as equation 7
            optimizer_step(optimizer, policy, 1.0)
            clipped.append(stopped[answered].float().mean().item())
    kl, length = sum(kl_penalty(*both).sum().item() for both in zip(old, frozen)), sum(map(len, answers))
    return {"reward": rewards.mean().item(), "kl": kl / len(pairs), "clipped": mean(clipped), "length": length / len(pairs),
            "generated": length, "trained": s.epochs * (length + sum(len(p.prompt) for p in pairs))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=f"[{f.default or 'none'}]")
    s = Settings(**vars(parser.parse_args(argv)))
    folder = Path(s.model or measure.base_model(s.seed))
    policy, text, cfg = measure.opened(folder, s.seed)
    reference, rng = twin(policy), torch.Generator().manual_seed(s.seed)
    data, held = [measure.rows_of(name, text, cfg) for name in ("train", s.split)]
    pairs = [Pair(e.prompt, e.chosen, e.chosen, row=e.row) for e in map(held.__getitem__, range(len(held)))]
    optimizer, lines = torch.optim.Adam(policy.parameters(), s.lr), []
    reward = lambda e, answer: passes(text.decode(answer, True), data.verifiers[e.row])
    table = {"start": measure.judged(policy, held, pairs, cfg, text)}
    began, busy = time.perf_counter(), time.process_time()
    for step in range(1, s.steps + 1):
        examples = [data[i] for i in torch.randperm(len(data), generator=rng)[:s.prompts].tolist()]
        lines.append(ppo_step(policy, reference, optimizer, examples, reward, s, text.eos, rng, text.vocab))
        if step % 10 == 0 or step == s.steps:
            shown = [f"{k} {mean(line[k] for line in lines[-10:]):.3f}" for k in ("reward", "kl", "clipped", "length")]
            shown += [f"{sum(line[k] for line in lines):,} tokens {k}" for k in ("generated", "trained")]
            print(f"step {step}/{s.steps}", *shown, sep="  ", flush=True)
    print(f"{time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s of a processor, for these steps")
    table["after"] = measure.judged(policy, held, pairs, cfg, text)
    shown = {name: {k: row[k] for k in row if k != "ranking_accuracy"} for name, row in table.items()}
    print("", table_text(shown, f"{len(held)} held-out rows"), "", sep="\n")
    if s.out:
        save_pretrained(policy, Path(s.out, "model"), torch.float32, companions(folder))
        Path(s.out, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, table]), "utf-8")


if __name__ == "__main__":
    main()
