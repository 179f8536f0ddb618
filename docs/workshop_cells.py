# %% [markdown]
# # SAPO in an afternoon: nine lines, then six bugs
#
# The first half walks through Algorithm 1 of [Self-Augmented Preference Optimization](https://arxiv.org/abs/2405.20830)
# (Yin et al.), line by line, on four little stories that one can read. The second half plants six bugs, one at a time,
# in copies of the method's files: *plant, look, guess, test, undo*. Your own files are never touched. Run that half
# cell by cell, as the last cell of each station shows what was planted.
#
# You need what training needs, pytest, and a notebook:
#
# ```
# pip install -r requirements.txt pytest jupyterlab
# jupyter lab docs/workshop.ipynb
# ```
#
# A laptop's processor is enough: run from top to bottom it takes a few minutes, and what remains is reading. All calls are the
# project's own; what only draws or plants is in `tools/workshop.py`. Keep `sapo.py` open beside this page: the numbers
# [1] to [9] are the ones in its docstring. Your figures will differ from your neighbour's, because another processor
# rounds differently; so compare with *your own* clean run, and ask for signs, not for digits.
#
# *(Made from `docs/workshop_cells.py` by `python tools/make_notebook.py`; edit that file.)*

# %%
import os
import sys
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "sapo.py").is_file())
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import inspect
import warnings

warnings.filterwarnings("ignore", message="IProgress")

import matplotlib.pyplot as plt
import numpy as np
import torch

import workshop
from buffer import ReplayBuffer, collate, common_prefix
from losses import dpo_loss, preference_loss, score, scored_tokens
from sapo import SAPOConfig, State, ema_update, generate_segments, optimizer_step
from sapo import sapo_step, splice, split
from workshop import draw_curves, draw_strips, plant, run, show_pair

# %matplotlib inline
torch.set_num_threads(1)        # so small a model is slower on two

# %% [markdown]
# ## The base
#
# Half a million weights, made from scratch in about a minute by supervised fine-tuning on stories that have *habits*:
# the base calls some children "she" who are "he", and turns some colours into others. What SAPO learns from are 300
# clean stories. The next cell runs `python train.py --steps 1 --lr 0`, unless you have that folder.

# %%
base = workshop.make_base("runs/base")
text, data, eos = base.text, base.data, base.text.eos
policy = workshop.load_pretrained(base.folder)
print(f"{sum(p.numel() for p in policy.parameters()):,} weights, {len(data)} clean stories")
assert len(data) >= 100

# %% [markdown]
# ## [1] Draw a mini-batch of (x, y+)
#
# Four examples are a batch that one can read. x is a prompt, y+ a response that somebody wrote. To the method both are
# lists of token ids; the last id of y+ is the end token.

# %%
draw = base.draw(seed=1)
examples = draw(4)
for e in examples:
    print("x   ", text.decode(e.prompt, True).strip())
    print("y+  ", text.decode(e.chosen, True).strip(), "\n")

draw_strips([[("x", len(e.prompt)), ("y+", len(e.chosen))] for e in examples])
assert all(e.chosen[-1] in eos for e in examples)
assert len({e.row for e in examples}) == 4, "no row comes twice within an epoch"

# %% [markdown]
# ## [2] Cut y+ at a random place into A + B + C
#
# B is a segment of 12 tokens (the paper: 256), and each place is equally likely. The end token never lies in B.
# Below: the four cuts, and where B starts if one text is cut 4,000 times.

# %%
rng = np.random.default_rng(0)
cuts = [split(e.chosen, "12", eos, rng) for e in examples]
draw_strips([[("A", start), ("B", stop - start), ("C", len(e.chosen) - stop)]
             for e, (start, stop) in zip(examples, cuts)])

y = examples[0].chosen
starts = [split(y, "12", eos, rng)[0] for _ in range(4000)]
places = len(y) - 1 - 12 + 1                       # the end token is not B's
plt.figure(figsize=(6, 1.8))
plt.bar(range(places), np.bincount(starts, minlength=places), color="#7fb68f")
plt.axhline(4000 / places, color="black", linewidth=0.8)
plt.xlabel("where B starts")
plt.show()
for e, (start, stop) in zip(examples, cuts):
    assert stop - start == 12 and e.chosen[stop - 1] not in eos
assert set(starts) == set(range(places)), "every legal place comes"

# %% [markdown]
# ## [3] The EMA model generates B' after (x, A)
#
# `State` holds everything that Algorithm 1 changes. At the start theta_ema, pi_ref and theta are one model. The
# generator sees x and A, and neither B nor C. The picture shows what it might have said where B' first leaves B: y+ has
# the green token there, and B' the red one.

# %%
cfg = SAPOConfig(**workshop.SETTINGS)
state = State.start(policy, cfg, eos, lr=1e-4, vocab=text.vocab,
                    steps_per_epoch=len(data) // cfg.batch_size)
sample_rng = torch.Generator().manual_seed(0)
segments = generate_segments(state.generator, examples, cuts, cfg, eos, sample_rng, text.vocab)
for e, (start, stop), new in zip(examples, cuts, segments):
    print("B ", repr(text.decode(e.chosen[start:stop])), "\nB'", repr(text.decode(new)), "\n")

for e, (start, stop), new in zip(examples, cuts, segments):
    if e.chosen[start:stop] != new:                     # the first that differs from B
        break
same = min(common_prefix(e.chosen[start:stop], new), len(new) - 1, stop - start - 1)
with torch.no_grad():
    logits = state.ema(torch.tensor([e.prompt + e.chosen[:start] + new[:same]]))[0, -1]
top = logits.softmax(-1).topk(8)
tokens = top.indices.tolist()
colours = {e.chosen[start + same]: "#57a773", new[same]: "#d9695f"}
plt.figure(figsize=(6, 1.8))
plt.bar([repr(text.decode([i])) for i in tokens], top.values,
        color=[colours.get(i, "#c3c9d1") for i in tokens])
plt.ylabel("probability")
plt.tick_params(labelsize=8)
plt.show()
for new, (start, stop) in zip(segments, cuts):
    assert 1 <= len(new) <= stop - start, "B' is at most as long as B"
other = [e._replace(chosen=e.chosen[:stop] + e.chosen[:3] + [eos[0]])
         for e, (_, stop) in zip(examples, cuts)]
again = generate_segments(state.generator, other, cuts, cfg, eos,
                          torch.Generator().manual_seed(0), text.vocab)
assert again == segments, "another C changes nothing: the generator has not read it"

# %% [markdown]
# ## [4] y- <- A + B' + C
#
# The rejected response is y+ with other words in one place. Nobody checks that B' is worse than B: the method needs
# no verifier. Find a pair below whose y- has nothing wrong in it.

# %%
pairs = [splice(e, cut, new, eos) for e, cut, new in zip(examples, cuts, segments)]
for p in pairs:
    show_pair(p, text)
strips = []
for p in pairs:
    strips.append([("A", p.start), ("B", p.stop - p.start), ("C", len(p.chosen) - p.stop)])
    strips.append([("A", p.start), ("B'", p.rejected_stop - p.start),
                   ("C", len(p.rejected) - p.rejected_stop)])
draw_strips(strips, ["y+", "y-"] * len(pairs))
for p in pairs:
    assert p.rejected[:p.start] == p.chosen[:p.start], "A stands in both"
    C = p.chosen[p.stop:] if p.keeps_C else []
    assert p.rejected[p.rejected_stop:] == C, "and C, if B' did not end the answer"

# %% [markdown]
# ## [5] Append to the buffer, the oldest leaves
#
# Here is a buffer of 8 that gets 3 pairs a step. A row of the picture is what it holds after a step: the number is the
# step in which a pair came, and the darker, the longer it has waited.

# %%
small, waited = ReplayBuffer(8), np.full((6, 8), np.nan)
plt.figure(figsize=(4.5, 2.4))
for step in range(6):
    for e, cut, new in list(zip(examples, cuts, segments))[:3]:
        pair = splice(e, cut, new, eos)
        pair.step = step
        small.add(pair)
    for place, pair in enumerate(small.pairs):
        waited[step, place] = step - pair.step
        plt.text(place, step, pair.step, ha="center", va="center", fontsize=8)
plt.imshow(waited, cmap="Greens", vmin=-1, vmax=4, aspect="auto")
plt.xlabel("place in the buffer, oldest first")
plt.ylabel("step")
plt.show()
assert [pair.step for pair in small.pairs] == [3, 3, 4, 4, 4, 5, 5, 5]

# %% [markdown]
# ## [6] Draw a mini-batch of triples from the buffer
#
# Most of what the policy learns from is some steps old: SAPO is off-policy. A draw never has a pair twice, and all
# pairs are equally likely. Here 4 of 8 are drawn 500 times.

# %%
for _ in range(500):
    drawn = small.sample(4)
    assert len({id(p) for p in drawn}) == 4
plt.figure(figsize=(4, 1.6))
plt.bar(range(8), [p.uses for p in small.pairs], color="#7fb68f")
plt.axhline(250, color="black", linewidth=0.8)
plt.xlabel("place in the buffer")
plt.ylabel("uses")
plt.show()
assert len(small) == 8, "a drawn pair stays"
assert all(150 < p.uses < 350 for p in small.pairs)

# %% [markdown]
# ## [7] The loss: first the scores
#
# The model reads x + y once, and each place predicts the token *after* it. So the labels of a row are its ids, one
# place to the left, and only the response is scored. (Compare `labels` in `docs/exercises.py`.)

# %%
e = examples[0]
row = e.prompt + e.chosen
shown = range(len(e.prompt) - 3, len(e.prompt) + 3)
print("token that is read   ", [text.decode([row[t]]) for t in shown])
print("token to be predicted",
      [text.decode([row[t + 1]]) if t + 1 >= len(e.prompt) else "-" for t in shown])


def token_logps(model, x, y):
    """Log-prob of each token of y after x: (len(y),)."""
    logits = model(torch.tensor([x + y]))[0, len(x) - 1:-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(y)[:, None])[:, 0]


p = next((p for p in pairs if p.keeps_C and p.chosen != p.rejected), pairs[0])
with torch.no_grad():
    plus, minus = [token_logps(policy, p.prompt, y) for y in (p.chosen, p.rejected)]
figure, both = plt.subplots(2, 1, figsize=(7, 2.8), sharex=True, sharey=True, layout="constrained")
for axes, values, stop, colour in ((both[0], plus, p.stop, "#57a773"),
                                   (both[1], minus, p.rejected_stop, "#d9695f")):
    t = np.arange(len(values))
    for part, paint in ((t < p.start, "#9aa3ad"), ((t >= p.start) & (t < stop), colour),
                        (t >= stop, "#6f9ee8")):
        axes.bar(t[part], values.numpy()[part], color=paint)
both[0].set_ylabel("y+, nats")
both[1].set_ylabel("y-, nats")
both[1].set_xlabel("token of the response: A grey, B green, B' red, C blue")
plt.show()

# %% [markdown]
# The project's own `score` gives one sum for each side. It leaves out the tokens that both texts begin with, because
# they cancel; so compare the *gap*, log p(y+) - log p(y-). Often nearly all of it lies in the first tokens of C: they
# were written to follow B, not B'. We call that the seam.

# %%
batch = collate(pairs, **scored_tokens(cfg))
with torch.no_grad():
    chosen, rejected = score(policy, batch)
    by_hand = torch.stack([token_logps(policy, p.prompt, p.chosen).sum()
                           - token_logps(policy, p.prompt, p.rejected).sum() for p in pairs])
    reference = score(state.reference, batch)
print("gap of each pair, in nats:", [round(v, 2) for v in (chosen - rejected).tolist()])
assert torch.allclose(chosen - rejected, by_hand, atol=1e-3)

# %% [markdown]
# **Then the loss.** DPO asks how far each side has moved *from the reference*: at the first step nothing has moved, so
# every margin is 0, and the loss is ln 2 whatever the texts are. Remember that number for the second half.

# %%
loss = dpo_loss(chosen, rejected, *reference, beta=cfg.beta)
margin = torch.linspace(-6, 6, 100)
plt.figure(figsize=(4, 2))
plt.plot(margin, -torch.nn.functional.logsigmoid(margin), color="#555555")
plt.scatter((loss.chosen_rewards - loss.rejected_rewards), loss.value, color="#d9695f", zorder=3)
plt.xlabel("margin: beta times the change of the gap")
plt.ylabel("loss")
plt.show()
assert torch.allclose(loss.value, torch.tensor(2.0).log(), atol=1e-5)

# %% [markdown]
# ## [8] theta <- theta - lr * gradient
#
# One step of AdamW on these four pairs. Each pair's gap moves; the reference stays where it was.

# %%
before = chosen - rejected
losses, metrics = preference_loss(policy, batch, cfg, reference)
losses.mean().backward()
norm = optimizer_step(state.optimizer, policy, cfg.max_grad_norm)
with torch.no_grad():
    after = torch.sub(*score(policy, batch))
    still = torch.sub(*score(state.reference, batch))
plt.figure(figsize=(4, 1.8))
plt.bar(range(4), after - before, color="#7fb68f")
plt.axhline(0, color="black", linewidth=0.8)
plt.xticks(range(4), [f"pair {i}" for i in range(4)])
plt.ylabel("change of the gap, nats")
plt.show()
assert norm > 0 and (after - before).sum() > 0, "y+ has gained on y-"
assert torch.allclose(still, before, atol=1e-4), "the reference has not moved"

# %% [markdown]
# ## [9] theta_ema <- alpha theta_ema + (1 - alpha) theta, every k steps
#
# alpha weighs the *old* EMA. Below, one weight of the policy moves in a line, and three EMAs follow it.

# %%
old, new = [next(m.parameters()).detach().clone() for m in (state.ema, policy)]
distance = ema_update(state.ema, policy, alpha=0.9)
assert torch.allclose(next(state.ema.parameters()), 0.9 * old + 0.1 * new, atol=1e-6)
assert distance > 0

plt.figure(figsize=(4.5, 2))
plt.plot(range(30), range(30), color="black", label="policy")
for alpha in (0.5, 0.9, 0.99):
    follower, leader = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    path = []
    follower.requires_grad_(False).weight.zero_()
    for step in range(30):
        leader.weight.data.fill_(float(step))
        if step % 2 == 0:                              # k = 2
            ema_update(follower, leader, alpha)
        path.append(follower.weight.item())
    plt.plot(path, label=f"alpha {alpha}")
plt.legend(fontsize=8)
plt.xlabel("step")
plt.show()

# %% [markdown]
# ## All nine
#
# `sapo_step` is these nine lines. Read it; you have met every call.

# %%
print(inspect.getsource(sapo_step))

# %% [markdown]
# Sixty steps of it, in a batch of 16, with a buffer of 64 pairs. This is your **clean run**: every station compares
# with it. The second one, `slow`, rewrites whole responses with a generator that hardly moves (alpha 0.99), at three
# times the learning rate; stations 4 and 5 need it.

# %%
clean = run(base)
draw_curves({"clean": clean}, "loss", "rewards/accuracies", "buffer/staleness", "logps/chosen")
assert abs(clean.lines[0]["loss"] - np.log(2)) < 1e-4

# %%
slow = run(base, lr=3e-4, **workshop.SLOW)
draw_curves({"slow": slow}, "loss", "ema/distance", "pairs/rejected_verified",
            "logps/chosen", "logps/rejected")
assert slow.last("ema/distance") > 5 * clean.last("ema/distance")

# %% [markdown]
# # Six bugs
#
# Each station plants a bug. **Look** at the curves beside your clean run, write down what is odd, and **guess** the
# function; `bug.show("sapo.split")` prints any function of `losses`, `buffer` or `sapo` as it is in the station. Three
# hints are folded below each picture. Then run the **test** that catches the bug, and **undo**. The questions are
# answered in [workshop_answers.md](workshop_answers.md).

# %% [markdown]
# ## Station 1. A part of the answer
#
# *Question:* the curves are those of the clean run, as far as chance goes. So what does the second picture say, and why can no loss curve
# say it?

# %%
bug = plant(1)
bent = run(base, bug)
draw_curves({"clean": clean, "station 1": bent}, "loss", "rewards/accuracies", "logps/chosen")


def left_behind(run):
    """How many pairs have 0, 1, 2 ... tokens between B and the end of y+."""
    return np.bincount([len(p.chosen) - 1 - p.stop for p in run.pairs], minlength=10)[:10]


plt.figure(figsize=(5, 1.8))
plt.bar(np.arange(10) - 0.2, left_behind(clean), 0.4, label="clean")
plt.bar(np.arange(10) + 0.2, left_behind(bent), 0.4, label="station 1")
plt.xlabel("tokens of C before the end token")
plt.legend(fontsize=8, bbox_to_anchor=(1, 1))
plt.show()
assert left_behind(clean)[0] > 0 == left_behind(bent)[0]

# %% [markdown]
# {{hints 1}}

# %%
# bug.show("sapo.generate_segments")
bug.guess("")               # write a function here, such as sapo.generate_segments

# %%
assert bug.test()

# %%
bug.reveal()
rng = np.random.default_rng(0)
stops = {split(list(range(20)), "12", (), rng)[1] for _ in range(300)}
assert 20 in stops, "undone: your own split reaches the end"
bug = None

# %% [markdown]
# ## Station 2. What is the model asked?
#
# *Questions:* the first loss is ln 2 and it falls, as it should. Which curve gives the bug away? What is the model
# asked to predict, and why is the first loss ln 2 whatever the labels are?

# %%
bug = plant(2)
bent = run(base, bug)
draw_curves({"clean": clean, "station 2": bent}, "loss", "logps/chosen", "logps/rejected")
assert abs(bent.lines[0]["loss"] - np.log(2)) < 1e-3
assert bent.lines[0]["logps/chosen"] < 10 * clean.lines[0]["logps/chosen"] < 0

# %% [markdown]
# {{hints 2}}

# %%
bug.guess("")

# %%
assert bug.test()

# %%
bug.reveal()
bug = None

# %% [markdown]
# **Encore.** Another bug of the same kind, where log-probs become scores. *Question:* which one number, in the first
# line of any DPO run, tells you that policy and reference are scored alike?

# %%
bug = plant("2b")
bent = run(base, bug, steps=5)
print(f"first loss {bent.lines[0]['loss']:.3f}, in the clean run {clean.lines[0]['loss']:.3f}")
assert abs(bent.lines[0]["loss"] - np.log(2)) > 0.1

# %%
bug.reveal()
bug = None

# %% [markdown]
# ## Station 3. Old acquaintances
#
# *Questions:* which pairs does the policy see? Which two curves look *better* than the clean run's, and why is that no
# comfort?

# %%
bug = plant(3)
bent = run(base, bug)
draw_curves({"clean": clean, "station 3": bent},
            "loss", "rewards/accuracies", "buffer/staleness", "buffer/uses")
assert bent.lines[-1]["buffer/staleness"] > 5 * clean.lines[-1]["buffer/staleness"]

# %% [markdown]
# {{hints 3}}

# %%
bug.guess("")

# %%
assert bug.test()

# %%
bug.reveal()
queue = ReplayBuffer(2)
for pair in pairs[:3]:
    queue.add(pair)
assert list(queue.pairs) == pairs[1:3], "undone: the oldest leaves"
bug = None

# %% [markdown]
# ## Station 4. Who follows whom?
#
# This one is compared with `slow`: at alpha 0.5 its curves agree with the clean run's in every digit. *Questions:* why
# do they? Which model is the EMA now? Which row of "Relatives as settings" in [method.md](method.md) is nearest to it?

# %%
bug = plant(4)
bent4 = run(base, bug, lr=3e-4, **workshop.SLOW)
draw_curves({"slow": slow, "station 4": bent4},
            "ema/distance", "pairs/rejected_verified", "rewards/margins")
assert bent4.last("ema/distance") < slow.last("ema/distance") / 50

# %% [markdown]
# {{hints 4}}

# %%
bug.guess("")

# %%
assert bug.test()

# %%
bug.reveal()
follower, leader = [torch.nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in range(2)]
follower.weight.fill_(0.0), leader.weight.fill_(1.0), leader.requires_grad_(True)
ema_update(follower, leader, 0.75)
assert follower.weight.item() == 0.25, "undone: alpha weighs the old EMA"
bug = None

# %% [markdown]
# ## Station 5. Whose words?
#
# Again beside `slow`. *Questions:* why does ema/distance not see this bug? The share of y- that pass the verifier is
# *higher* with it: does that make the method worse? What would you have to run before you said so?

# %%
bug = plant(5)
bent5 = run(base, bug, lr=3e-4, **workshop.SLOW)
draw_curves({"slow": slow, "station 4": bent4, "station 5": bent5},
            "ema/distance", "pairs/rejected_verified", "rewards/margins")
assert bent5.last("ema/distance") > slow.last("ema/distance") / 5

# %% [markdown]
# {{hints 5}}

# %%
bug.guess("")

# %%
assert bug.test()

# %%
bug.reveal()
bug = None

# %% [markdown]
# ## Station 6. A loss that falls
#
# *Questions:* why does a loss that falls prove nothing here? logps/chosen falls too, as it does in `slow`: what is the
# difference? (Look at logps/rejected, here and there.)

# %%
bug = plant(6)
bent = run(base, bug)
draw_curves({"clean": clean, "station 6": bent},
            "loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
assert bent.last("loss") < np.log(2)
assert bent.last("rewards/margins", 50) < 0 < clean.last("rewards/margins", 50)

# %% [markdown]
# {{hints 6}}

# %%
bug.guess("")

# %%
assert bug.test()

# %%
bug.reveal()
nats = torch.tensor([0.0, 5.0])
falls = dpo_loss(nats, *torch.zeros(3, 2), beta=1.0).value
assert falls[1] < falls[0], "undone: the loss falls as y+ gains"
bug = None

# %% [markdown]
# ## Last
#
# Which of the six would you have found from the loss alone? From the other curves? Which of them made something look
# *better*? That is why each has a test.
#
# **Homework:** `python tools/exercises.py` gives you seven pieces of the method to write yourself, and marks them.
# [workshop.md](workshop.md) has the same stations for a terminal, and a loss of your own to add.
