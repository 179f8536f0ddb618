"""Planted bugs: each is one that somebody could make, and each has a test that must turn red.

    python tools/mutants.py              plant each bug in a copy of the project and run its test: caught or MISSED
    python tools/mutants.py list         the table; stations of the workshop are marked
    python tools/mutants.py 7            plant number 7 here, and say where
    python tools/mutants.py station 3    plant the bug of a station of the workshop here, and say nothing: it is to be found
    python tools/mutants.py hint         one of three hints, the next at each call
    python tools/mutants.py guess NAME   whether it is in this function
    python tools/mutants.py reveal       what was planted, and the test that it turns red
    python tools/mutants.py undo         put everything back

A new bug is one more entry below: a name, the file, the text it changes (found there exactly once), the new text, the
test. Where the text is not found the program stops, so that no bug quietly stops being planted.
Left out: torch and pytest, which only the tests themselves need. Planting works on any laptop that has Python.
"""

import argparse
import ast
import difflib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BACKUP = ".mutant.json"       # what stood in a file before something was planted in it
NOT_COPIED = (".*", "__pycache__", "venv", "runs", "*.tmp")
TIMEOUT = 300                       # seconds for one test


class Mutant(NamedTuple):
    name: str                       # what is wrong, in a few words
    file: str
    old: str                        # stands in the file exactly once
    new: str
    test: str                       # the test that must turn red
    station: str = ""               # of the workshop


STATIONS = ("1 segment", "2 shift and sum/mean", "3 buffer", "4 which way alpha points", "5 who generates B'", "6 collapsing curves")
ENCORE = {"2b": "DPO is given means"}        # further bugs of the workshop, by name
HINTS = {           # of a station: what to look at, then which line of Algorithm 1; the third hint is the function
    "1": ("Take many pairs, and count how many tokens of y+ stand between B and the end. Which number never comes?", "It is in [2], the cut."),
    "2": ("Compare logps/chosen of the very first step with the clean run's. The base is the same, and nothing was learned yet.",
          "It is in [7], but not in a loss: look for the place where each token gets the label that it must predict."),
    "2b": ("Compare the loss of the very first step with ln 2, and logps/chosen with the clean run's.", "It is in [7], between the log-probs and the loss."),
    "3": ("Look at buffer/staleness: how many steps has a drawn pair waited?", "It is in [5]."),
    "4": ("Look at ema/distance, and at the share of y- that pass. Who generates y-, and how far is it from the policy?", "It is in [9]."),
    "5": ("ema/distance looks as it should, and yet y- gets better as fast as the policy does. Whose words may these be?", "It is in [3]."),
    "6": ("Look at rewards/margins and rewards/accuracies, not at the loss.", "It is in [7].")}
LOSSES, BUFFER, MODEL, LORA, SAPO, PPO = (f"tests/test_{name}.py::test_" for name in ("losses", "buffer", "model", "lora", "sapo", "ppo"))

MUTANTS = [
    # ------------------------------------------------------------------------------------------------ losses.py
    Mutant("DPO compares rejected with chosen", "losses.py",
           "F.logsigmoid(chosen_rewards - rejected_rewards)",
           "F.logsigmoid(rejected_rewards - chosen_rewards)",
           LOSSES + "dpo_falls_as_the_margin_grows", STATIONS[5]),
    Mutant("DPO adds the reference instead of taking it away", "losses.py",
           "    rejected_rewards = beta * (rejected - ref_rejected)\n    loss",
           "    rejected_rewards = beta * (rejected + ref_rejected)\n    loss",
           LOSSES + "the_first_dpo_loss_is_ln_2"),
    Mutant("the odds-ratio term has the wrong sign", "losses.py",
           "nll - lam * F.logsigmoid(ratio)",
           "nll + lam * F.logsigmoid(ratio)",
           LOSSES + "the_orpo_gradient_raises_chosen_and_lowers_rejected"),
    Mutant("ORPO compares probabilities, not odds", "losses.py",
           "    ratio = log_odds(chosen) - log_odds(rejected)\n    return",
           "    ratio = chosen - rejected\n    return",
           LOSSES + "orpo_is_what_a_loop_of_floats_says"),
    Mutant("log1mexp without the split at -ln 2", "losses.py",
           "return torch.where(near, from_expm1, from_log1p)",
           "return from_log1p",
           LOSSES + "log1mexp_keeps_its_digits_in_float32"),
    Mutant("the branch of log1mexp that is not taken gets any argument", "losses.py",
           "torch.log1p(-torch.exp(torch.where(near, -1.0, x)))",
           "torch.log1p(-torch.exp(x))",
           LOSSES + "log_odds_are_finite_in_float32"),
    Mutant("SLiC's hinge opens the wrong way", "losses.py",
           "F.relu(delta - chosen + rejected)",
           "F.relu(delta + chosen - rejected)",
           LOSSES + "beyond_its_margin_a_pair_costs_slic_the_nll_alone"),
    Mutant("the log-softmax is taken in half precision", "losses.py",
           "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))",
           "logits = logits.contiguous()",
           LOSSES + "half_precision_goes_in_and_float32_comes_out"),
    Mutant("a label of id 0 counts as none", "losses.py",
           "wanted = labels != IGNORE",
           "wanted = labels > 0",
           LOSSES + "token_logps_are_the_log_softmax_at_the_labels"),

    # ------------------------------------------------------------------------------------------------ buffer.py
    Mutant("the newest pair leaves a full buffer, not the oldest", "buffer.py",
           "        self.pairs.append(pair)",
           "        if len(self) == self.pairs.maxlen:\n            self.pairs.pop()\n        self.pairs.append(pair)",
           BUFFER + "the_oldest_pair_leaves_first", STATIONS[2]),
    Mutant("pairs are drawn with replacement", "buffer.py",
           "replace=False, p=weights",
           "replace=True, p=weights",
           BUFFER + "no_pair_comes_twice_in_one_draw"),
    Mutant("only the newest pairs are drawn", "buffer.py",
           "for i in self.rng.choice(len(self), n, replace=False, p=weights)]",
           "for i in range(len(self) - n, len(self))]",
           BUFFER + "draws_are_uniform_over_the_buffer"),
    Mutant("uses are not counted", "buffer.py",
           "            pair.uses += 1",
           "            pair.uses = 1",
           BUFFER + "uses_are_counted_on_the_pairs_that_were_drawn"),
    Mutant("inverse-count prefers what was used most", "buffer.py",
           "weights = 1.0 / (1.0 + np.array([p.uses for p in self.pairs], float))",
           "weights = 1.0 + np.array([p.uses for p in self.pairs], float)",
           BUFFER + "inverse_count_evens_the_uses_out"),
    Mutant("the generator is not restored", "buffer.py",
           '        self.rng.bit_generator.state = state["rng"]',
           "        self.rng = np.random.default_rng(0)",
           BUFFER + "a_saved_buffer_continues_the_same_draws"),
    Mutant("the reference's log-probs are saved in half their digits", "buffer.py",
           '"floats": table(map(attrgetter(*FLOATS), pairs), FLOATS, np.float64)',
           '"floats": table(map(attrgetter(*FLOATS), pairs), FLOATS, np.float32)',
           BUFFER + "what_is_packed_unpacks_to_the_same_pairs"),

    # ------------------------------------------------------------------------------------------------ model.py
    Mutant("rotary positions pair neighbours", "model.py",
           "x.roll(x.shape[-1] // 2, -1)",
           "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)",
           MODEL + "the_logits_are_those_of_transformers[llama]"),
    Mutant("RMSNorm takes the usual eps, not the checkpoint's", "model.py",
           "self.eps, self.gemma = c.rms_norm_eps, c.gemma_norms",
           "self.eps, self.gemma = 1e-6, c.gemma_norms",
           MODEL + "the_logits_are_those_of_transformers[llama]"),
    Mutant("key-value heads are repeated in the wrong order", "model.py",
           "t.repeat_interleave(q.shape[1] // t.shape[1], 1)",
           "t.repeat(1, q.shape[1] // t.shape[1], 1, 1)",
           MODEL + "prefill_and_decoding_give_the_logits_of_the_whole_text[exact-groups]"),
    Mutant("rope_theta is read in one dialect only", "machine/config.py",
           '"beta_slow": 1.0} | scaling',
           '"beta_slow": 1.0} | {k: v for k, v in scaling.items() if k != "rope_theta"}',
           MODEL + "the_logits_are_those_of_transformers[llama]"),
    Mutant("llama3 scaling is ignored", "model.py",
           'return (1 - keep) * inv / rope.get("factor", 1.0) + keep * inv',
           'return inv if rope["rope_type"] == "llama3" else (1 - keep) * inv / rope.get("factor", 1.0) + keep * inv',
           MODEL + "the_logits_are_those_of_transformers[llama, llama3 rope beyond its length]"),
    Mutant("llama3 scaling slows the short waves, not the long ones", "model.py",
           "keep = ((length * inv - low) / (high - low)).clamp(0, 1)",
           "keep = 1 - ((length * inv - low) / (high - low)).clamp(0, 1)",
           MODEL + "the_logits_are_those_of_transformers[llama, llama3 rope beyond its length]"),
    Mutant("the sliding window is one token too wide", "model.py",
           "(key <= query) & (key > query - self.window)",
           "(key <= query) & (key >= query - self.window)",
           MODEL + "the_logits_are_those_of_transformers[mistral, beyond its window]"),
    Mutant("a tied head is only equal after loading, not tied", "machine/folders.py",
           "        model.lm_head.weight = model.model.embed_tokens.weight",
           "        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())",
           MODEL + "a_tied_head_that_is_stored_as_well_loads_wherever_it_lies"),
    Mutant("attention takes the stream for one text", "model.py",
           "stream = rows.gather(1, own), places",
           "stream = torch.arange(len(ids))[None], torch.arange(len(ids))",
           MODEL + "both_texts_of_a_stream_have_the_logits_of_a_text_alone"),
    Mutant("a token's position is its place in the stream", "model.py",
           "positions = places % width ",
           "positions = torch.arange(len(ids)) ",
           MODEL + "both_texts_of_a_stream_have_the_logits_of_a_text_alone"),
    Mutant("positions are off by one while decoding", "model.py",
           "positions=lengths + made - 1",
           "positions=lengths + made",
           MODEL + "a_batch_is_written_as_a_loop_without_a_cache_writes_it"),
    Mutant("short rows read their padding while decoding", "model.py",
           "return self.visible(positions, keys)[:, None]",
           "return self.visible(positions.amax().expand_as(positions), keys)[:, None]",
           MODEL + "many_rows_are_written_as_one_row_at_a_time"),
    Mutant("the first token is predicted by a prompt's first, not its last", "model.py",
           "ends = lengths[:, 0].cumsum(0) - 1",
           "ends = lengths[:, 0].cumsum(0) - lengths[:, 0]",
           MODEL + "a_batch_is_written_as_a_loop_without_a_cache_writes_it"),
    Mutant("top-p leaves out the token that reaches it", "model.py",
           "probs * (probs.cumsum(-1) - probs < top_p)",
           "probs * (probs.cumsum(-1) < top_p)",
           MODEL + "the_ends_of_the_unit_interval_give_tokens_that_were_kept"),
    Mutant("the temperature multiplies", "model.py",
           "logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature",
           "logits.to(torch.promote_types(logits.dtype, torch.float32)) * temperature",
           MODEL + "the_filtered_distribution_is_that_of_transformers"),
    Mutant("a twin is the model itself", "model.py",
           "shared = {id(p): p for p in model.parameters() if not p.requires_grad}",
           "shared = {id(p): p for p in model.parameters()}",
           MODEL + "changes_to_the_policy_do_not_reach_its_twin"),
    Mutant("LoRA forgets its scale", "model.py",
           "return linear(x, self.weight, self.bias) + self.scale * change",
           "return linear(x, self.weight, self.bias) + change",
           LORA + "an_adapter_adds_alpha_over_rank_times_B_A_x"),
    Mutant("LoRA's A trains as well", "model.py",
           "nn.Parameter(A.to(linear.weight.device), requires_grad=False)",
           "nn.Parameter(A.to(linear.weight.device))",
           LORA + "steps_move_the_merged_ema_as_an_ema_of_the_merged_policy"),
    Mutant("LoRA's B does not start at 0", "model.py",
           "nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))",
           "nn.Parameter(torch.randn(rows, rank, device=linear.weight.device) / rank)",
           LORA + "while_B_is_0_the_logits_are_the_bases_bit_for_bit"),
    Mutant("a model with adapters is saved without them", "machine/folders.py",
           "(module.merged() if merge else p).detach()",
           "p.detach()",
           LORA + "a_model_with_adapters_is_saved_as_a_plain_one"),
    Mutant("peft is told the scale for alpha", "machine/folders.py",
           '"lora_alpha": scale * rank',
           '"lora_alpha": scale',
           LORA + "peft_gives_the_adapter_the_same_logits"),

    # ------------------------------------------------------------------------------------------------ sapo.py, sampling
    Mutant("the cut never reaches the last place", "sapo.py",
           "start = int(rng.integers(0, n - length + 1))",
           "start = int(rng.integers(0, max(1, n - length)))",
           SAPO + "cuts_are_uniform_over_the_legal_ones", STATIONS[0]),
    Mutant("B may hold the end token", "sapo.py",
           "n = len(chosen) - (chosen[-1] in eos)",
           "n = len(chosen)",
           SAPO + "cuts_are_uniform_over_the_legal_ones"),
    Mutant("the policy generates B'", "sapo.py",
           "            state.generator, examples, cuts,",
           "            state.policy, examples, cuts,",
           SAPO + "what_is_generated_depends_on_the_ema_alone", STATIONS[4]),
    Mutant("the generator is not given A", "sapo.py",
           "prefixes = [list(e.prompt) + list(e.chosen[:start]) for e, (start, _) in zip(examples, cuts)]",
           "prefixes = [list(e.prompt) for e, (start, _) in zip(examples, cuts)]",
           SAPO + "the_generator_is_given_x_and_A_only"),
    Mutant("the generator has read B", "sapo.py",
           "prefixes = [list(e.prompt) + list(e.chosen[:start]) for e, (start, _) in zip(examples, cuts)]",
           "prefixes = [list(e.prompt) + list(e.chosen[:stop]) for e, (_, stop) in zip(examples, cuts)]",
           SAPO + "other_B_and_C_leave_B_prime_the_same"),
    Mutant("C follows B' though B' ended the answer", "sapo.py",
           "C = [] if segment[-1] in eos else list(example.chosen[stop:])",
           "C = list(example.chosen[stop:])",
           SAPO + "y_minus_is_A_then_new_tokens_then_C"),
    Mutant("segments are generated past the next update of the EMA", "sapo.py",
           "return min(-(-(steps - state.step % steps) // cfg.generate_every), cfg.generate_ahead)",
           "return cfg.generate_ahead",
           SAPO + "generating_ahead_changes_nothing"),
    Mutant("pairs made ahead enter the buffer at once", "sapo.py",
           "fresh = [state.ahead.popleft() for _ in range(wanted)]",
           "fresh = [state.ahead.popleft() for _ in range(len(state.ahead))]",
           SAPO + "fresh_pairs_are_in_the_buffer_before_the_draw_and_the_oldest_leaves"),

    # ------------------------------------------------------------------------------------------------ sapo.py, training
    Mutant("the policy learns from the fresh pairs, not from the drawn ones", "sapo.py",
           "pairs = state.buffer.sample(n)",
           "pairs = fresh",
           SAPO + "training_uses_the_drawn_pairs_not_the_fresh_ones"),
    Mutant("gradients of the last step are still there", "sapo.py",
           "    clear_gradients(state.optimizer, state.policy)\n",
           "",
           SAPO + "a_gradient_that_is_not_finite_moves_nothing_and_is_seen"),
    Mutant("a gradient that is not finite is stepped on", "sapo.py",
           "    if math.isfinite(norm):\n        optimizer.step()",
           "    optimizer.step()",
           SAPO + "a_gradient_that_is_not_finite_moves_nothing_and_is_seen"),
    Mutant("micro-batches are not weighed by their size", "sapo.py",
           "(loss.sum() / len(pairs)).backward()",
           "(loss.mean() / len(parts)).backward()",
           SAPO + "one_micro_batch_equals_four"),
    Mutant("each micro-batch counts in full", "sapo.py",
           "(loss.sum() / len(pairs)).backward()",
           "loss.mean().backward()",
           SAPO + "the_gradient_is_that_of_the_mean_loss"),
    Mutant("DPO is given means", "losses.py",
           "return self.chosen, self.rejected, *self.reference",
           "return self.chosen / self.lengths[:, 0], self.rejected / self.lengths[:, 1], *self.reference",
           SAPO + "dpo_takes_sums_and_leaves_out_A_which_cancels"),
    Mutant("ORPO is given sums", "losses.py",
           "return tuple(value / self.lengths[:, i % 2] for i, value in enumerate(self.sums))",
           "return self.sums",
           SAPO + "orpo_takes_means_over_the_whole_response"),
    Mutant("the NLL is divided by another text's length", "losses.py",
           "return self.nll / self.lengths[:, 2]",
           "return self.nll / self.lengths[:, 0]",
           SAPO + "losses_and_gradients_are_those_of_a_loop_over_tokens[orpo-response-prompt+response]"),
    Mutant("the seam counts C where y- has none", "buffer.py",
           "scored & pair.keeps_C & (place >= C)",
           "scored & (place >= C)",
           SAPO + "the_gap_is_that_of_the_segments_and_that_of_the_seam"),

    # ------------------------------------------------------------------------------------------------ sapo.py, EMA and reference
    Mutant("alpha weighs the new weights", "sapo.py",
           "old.lerp_(new, 1 - alpha)",
           "old.lerp_(new, alpha)",
           SAPO + "alpha_weighs_the_old_ema", STATIONS[3]),
    Mutant("the EMA is kept in bfloat16", "sapo.py",
           "old.lerp_(new, 1 - alpha)",
           "old.copy_(old.bfloat16().lerp_(new.bfloat16(), 1 - alpha))",
           SAPO + "the_ema_keeps_its_closed_form_over_1000_small_steps"),
    Mutant("the EMA moves before the optimizer", "sapo.py",
           """    norm = optimizer_step(state.optimizer, state.policy, cfg.max_grad_norm)                    # [8]
    state.clock.lap("optimizer")
    state.step += 1
    if math.isfinite(norm) and is_due(cfg.ema_every, state):
        metrics["ema/distance"] = ema_update(state.ema, state.policy, cfg.alpha)               # [9]
        copy_parameters(state.generator, state.ema)
""",
           """    state.step += 1
    if is_due(cfg.ema_every, state):
        metrics["ema/distance"] = ema_update(state.ema, state.policy, cfg.alpha)               # [9]
        copy_parameters(state.generator, state.ema)
    norm = optimizer_step(state.optimizer, state.policy, cfg.max_grad_norm)                    # [8]
""",
           SAPO + "the_ema_moves_every_k_steps_after_the_optimizer"),
    Mutant("the EMA moves every step", "sapo.py",
           "if math.isfinite(norm) and is_due(cfg.ema_every, state):",
           "if math.isfinite(norm):",
           SAPO + "the_ema_moves_every_k_steps_after_the_optimizer"),
    Mutant("the reference is the policy itself", "sapo.py",
           "reference=copy(policy) if cfg.loss in WITH_REFERENCE else None",
           "reference=policy if cfg.loss in WITH_REFERENCE else None",
           SAPO + "at_the_start_ema_and_reference_are_copies_of_the_policy_that_do_not_train"),
    Mutant("the reference is refreshed from the policy, whatever was asked", "sapo.py",
           'copy_parameters(state.reference, state.ema if cfg.ref_from == "ema" else state.policy)',
           "copy_parameters(state.reference, state.policy)",
           SAPO + "the_reference_is_refreshed_when_asked_from_whom_it_was_asked"),
    Mutant("log-probs of an older reference are used again", "sapo.py",
           "if not state.keep_ref or p.ref_version != state.ref_version]",
           "if not state.keep_ref or p.ref_version < 0]",
           SAPO + "after_a_refresh_nothing_of_the_old_reference_is_used"),

    # ------------------------------------------------------------------------------------------------ buffer.py and losses.py, how a pair is scored
    Mutant("labels are not shifted", "buffer.py",
           "np.where(wanted, ids[1:], IGNORE)",
           "np.where(wanted, ids[:-1], IGNORE)",
           SAPO + "a_label_is_the_token_after", STATIONS[1]),
    Mutant("the prompt is scored", "buffer.py",
           "scored = place >= (x if common else max(x, prefix + 1))",
           "scored = place >= (1 if common else prefix + 1)",
           SAPO + "labels_are_the_response_and_nothing_of_the_prompt"),
    Mutant("what stands behind a text's end counts", "losses.py",
           "F.pad(values, (0, 1))[batch.rows]",
           "values[batch.rows]",
           SAPO + "padding_changes_no_loss[orpo-response-response]"),
    Mutant("the prefix takes the token that opens the continuations", "buffer.py",
           "min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1) - 1",
           "min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)",
           SAPO + "labels_are_the_response_and_nothing_of_the_prompt"),
    Mutant("y- goes on from y+'s end, not from where it differs", "buffer.py",
           "shared = row[:prefix if share else 0] ",
           "shared = row[len(row) - prefix if share else 0:] ",
           SAPO + "a_shared_prefix_equals_two_plain_rows"),
    Mutant("the shared beginning counts for the chosen text only", "losses.py",
           "return by_text(values, batch).sum(-1).chunk(2)",
           "end = batch.rows.chunk(2)[0].amax(1, keepdim=True)\n"
           "    own = batch.rows > torch.cat((0 * end - 1, end))\n"
           "    return (by_text(values, batch) * own).sum(-1).chunk(2)",
           SAPO + "a_shared_prefix_equals_two_plain_rows"),
    Mutant("the generator stays behind when the EMA moves", "sapo.py",
           "        copy_parameters(state.generator, state.ema)\n",
           "",
           SAPO + "a_generator_of_its_own_follows_the_ema"),
    Mutant("a checkpoint forgets the pairs made ahead", "sapo.py",
           '"ahead": pack(self.ahead)',
           '"ahead": pack([])',
           SAPO + "a_state_goes_on_bit_for_bit_from_its_state_dict"),
    Mutant("a shared token is read back from padding", "model.py",
           "rows.flatten() % (n + 1), places",
           "rows.flatten() % n, places",
           MODEL + "any_texts_may_share_their_beginnings"),
    # ------------------------------------------------------------------------------------------------ families with layers of several kinds
    Mutant("all layers have the window of the first", "model.py",
           "*seen[kind], stream, cache and",
           "*seen[kinds[0]], stream, cache and",
           MODEL + "the_logits_are_those_of_transformers[qwen2, beyond the window of its second layer]"),
    Mutant("Gemma's norms multiply by their weight, not by 1 + weight", "model.py",
           "wide * (1 + self.weight.to(wide.dtype))",
           "wide * self.weight.to(wide.dtype)",
           MODEL + "gemmas_norm_and_embedding_are_those_of_transformers_to_the_bit"),
    Mutant("yarn leaves cos and sin as they are", "model.py",
           "(self.gain * angles.cos()).to(dtype), (self.gain * angles.sin()).to(dtype)",
           "angles.cos().to(dtype), angles.sin().to(dtype)",
           MODEL + "the_logits_are_those_of_transformers[llama, yarn rope]"),
    Mutant("a layer without rope has one all the same", "machine/config.py",
           "rope = _rope(ropes[layer]) if turning else NO_ROPE",
           "rope = _rope(ropes[layer])",
           MODEL + "the_logits_are_those_of_transformers[smollm3]"),

    # ------------------------------------------------------------------------------------------------ the method's family
    Mutant("IPO asks for twice the gap", "losses.py",
           "rejected_rewards - 1 / (2 * beta)).square()",
           "rejected_rewards - 1 / beta).square()",
           LOSSES + "ipo_draws_the_gap_to_1_over_2_beta_from_both_sides"),
    Mutant("RPO's weights are not a share of the whole", "losses.py",
           "/ tau).softmax(-1)",
           "/ tau).exp()",
           LOSSES + "each_row_of_rpos_weights_sums_to_1"),
    Mutant("RPO's weights sum to 1 over the chosen, not over the rejected", "losses.py",
           "/ tau).softmax(-1)",
           "/ tau).softmax(0)",
           LOSSES + "each_row_of_rpos_weights_sums_to_1"),
    Mutant("RPO compares each y- with all y+", "losses.py",
           "chosen_rewards[:, None] - rejected_rewards",
           "chosen_rewards - rejected_rewards[:, None]",
           LOSSES + "rpo_is_what_a_loop_of_floats_says"),
    Mutant("RPO compares prompts by their product, not by the cosine", "losses.py",
           "directions = F.normalize(prompts, dim=-1)",
           "directions = prompts",
           LOSSES + "rpo_is_what_a_loop_of_floats_says"),
    Mutant("RPO leaves out what both texts begin with", "losses.py",
           '"common": cfg.loss in (*OF_MEANS, "rpo"),',
           '"common": cfg.loss in OF_MEANS,',
           SAPO + "losses_and_gradients_are_those_of_a_loop_over_tokens[rpo-response]"),
    Mutant("a prompt's vector is that of its last token", "sapo.py",
           "embedding[p.prompt].to(wide).mean(0)",
           "embedding[p.prompt[-1]].to(wide)",
           SAPO + "a_prompts_vector_is_the_mean_of_the_references_embeddings"),
    Mutant("RPO asks the policy how near prompts are", "sapo.py",
           "prompts = prompt_vectors(state.reference, part)",
           "prompts = prompt_vectors(state.policy, part)",
           SAPO + "rpo_compares_within_a_micro_batch"),
    Mutant("SimPO's margin is a gift", "losses.py",
           "F.logsigmoid(beta * (chosen - rejected) - gamma)",
           "F.logsigmoid(beta * (chosen - rejected) + gamma)",
           LOSSES + "simpo_asks_for_its_margin"),
    Mutant("the reference's mean is taken over another text's length", "losses.py",
           "value / self.lengths[:, i % 2] for i, value",
           "value / self.lengths[:, i // 2] for i, value",
           SAPO + "losses_and_gradients_are_those_of_a_loop_over_tokens[ipo-response]"),
    Mutant("the NLL beside a loss is a sum over tokens", "losses.py",
           "loss.value + cfg.nll * scores.mean_nll if cfg.nll",
           "loss.value + cfg.nll * scores.nll if cfg.nll",
           SAPO + "losses_and_gradients_are_those_of_a_loop_over_tokens[dpo-response-response-0.6]"),

    # ------------------------------------------------------------------------------------------------ tools/ppo.py
    Mutant("PPO's ratio is not clipped", "tools/ppo.py",
           "return torch.minimum(free, clipped), clipped < free",
           "return free, clipped < free",
           PPO + "one_batch_moves_its_answers_only_so_far_however_many_epochs"),
    Mutant("PPO has no baseline", "tools/ppo.py",
           "return (rewards - rewards.mean(1, keepdim=True)) / (",
           "return rewards / (",
           PPO + "a_toy_reward_is_learned_whatever_its_level"),
    Mutant("a recorded step reads at the place where it was recorded, so that all of a GPU's texts are wrong", "model.py",
           "positions=lengths + made - 1, cache=cache",
           "positions=lengths + step - 1, cache=cache",
           "tests/test_graph.py::test_a_recorded_step_generates_the_same_texts"),
    Mutant("all chunks of the head share one cast of its weight", "losses.py",
           "cache_enabled=False",
           "cache_enabled=True",
           LOSSES + "chunks_do_not_add_up_the_heads_gradient_in_bfloat16"),
]

class Stop(Exception):
    """Nothing can go on; the message says why, in a line."""


# ------------------------------------------------------------------------------------------------ text in, text out

def read(root, file):
    return (root / file).read_text("utf-8")


def write(root, file, text):
    """With the line ends it was written with here: a checkout must not look changed after undo."""
    (root / file).write_bytes(text.replace("\n", os.linesep if b"\r\n" in (root / file).read_bytes() else "\n").encode("utf-8"))


def mutated(mutant, root=ROOT):
    """The text of the mutant's file with the bug in it."""
    path = root / mutant.file
    if not path.is_file():
        raise Stop(f"'{mutant.name}': there is no {mutant.file} here")
    text = read(root, mutant.file)
    if text.count(mutant.old) != 1:
        raise Stop(f"'{mutant.name}': the text it changes is found {text.count(mutant.old)} times in {mutant.file}, not once. "
                   f"Bring its entry in tools/mutants.py up to date:\n{mutant.old}")
    return text.replace(mutant.old, mutant.new)


def function_at(text, at):
    """The name of the innermost function around the character `at`, with its class: 'ReplayBuffer.sample'."""
    line, best = text[:at].count("\n") + 1, "the module"

    def visit(node, name):
        nonlocal best
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.lineno <= line <= child.end_lineno:
                best = ".".join(filter(None, (name, child.name)))
                visit(child, best)

    visit(ast.parse(text), "")
    return best


def where(mutant, root=ROOT):
    """The function that the mutant changes."""
    text = read(root, mutant.file)
    return function_at(text, text.index(mutant.old) + len(mutant.old) - len(mutant.old.lstrip()))


def of_station(name):
    """The mutant of a station of the workshop, "1" to "6" or "2b"."""
    found = [m for m in MUTANTS if m.name == ENCORE.get(name) or m.station and m.station.split()[0] == name]
    if not found:
        raise Stop(f"there is no station {name!r}; choose {', '.join(HINTS)}")
    return found[0]


def hint(mutant, station, level, root=ROOT):
    """Hint 1, 2 or 3 of a planted bug; one that belongs to no station has the third alone."""
    if level < 3 and station:
        return HINTS[station][level - 1]
    return f"Open {mutant.file}, {where(mutant, root)}."


def guessed(file, function, answer):
    """What is said to a guess such as split or sapo.split, where it is in this function of this file."""
    if not answer.strip():
        return "Name a function, such as sapo.generate_segments."
    module, last = Path(file).stem, function.split(".")[-1]
    if answer.strip().removesuffix("()") in (function, last, f"{module}.{function}", f"{module}.{last}"):
        return f"Yes, it is in {module}.{function}."
    return f"No, {answer} is as it was."


def revealed(mutant, root=ROOT):
    """Where a mutant is, what it is, and what it changes, with the test that turns red."""
    old, new = read(root, mutant.file).splitlines(), mutated(mutant, root).splitlines()
    changes = [line for line in difflib.unified_diff(old, new, n=1, lineterm="") if not line.startswith(("---", "+++", "@@"))]
    return "\n".join([f"In {mutant.file}, {where(mutant, root)}: {mutant.name}.", *changes, "This test turns red:",
                      f'    python -m pytest -x -q --tb=line "{mutant.test}"'])


# ------------------------------------------------------------------------------------------------ here, for a workshop

def plant(root, mutant, station=""):
    """Put the mutant into the working tree, and into BACKUP what stood there and what will be told."""
    if (root / BACKUP).exists():
        raise Stop("something is planted here already; first: python tools/mutants.py undo")
    hints = [hint(mutant, station, level, root) for level in ((1, 2, 3) if station else (3,))]
    secret = {"file": mutant.file, "original": read(root, mutant.file), "planted": mutated(mutant, root), "hints": hints, "given": 0,
              "where": where(mutant, root), "reveal": revealed(mutant, root)}
    (root / BACKUP).write_text(json.dumps(secret), "utf-8")
    write(root, mutant.file, secret["planted"])


def planted(root):
    """What `plant` wrote into BACKUP."""
    if not (root / BACKUP).exists():
        raise Stop("nothing is planted here")
    return json.loads((root / BACKUP).read_text("utf-8"))


def next_hint(root):
    secret = planted(root)
    secret["given"] = min(len(secret["hints"]), secret["given"] + 1)
    (root / BACKUP).write_text(json.dumps(secret), "utf-8")
    return f"Hint {secret['given']} of {len(secret['hints'])}. {secret['hints'][secret['given'] - 1]}"


def undo(root, force=False):
    """Put back what `plant` changed. Work that was done on top of it is thrown away only with `force`."""
    secret = planted(root)
    if not force and read(root, secret["file"]) not in (secret["original"], secret["planted"]):
        raise Stop(f"{secret['file']} changed since; 'python tools/mutants.py undo --force' throws that work away, so copy it first")
    write(root, secret["file"], secret["original"])
    (root / BACKUP).unlink()
    return secret["file"]


# ------------------------------------------------------------------------------------------------ in copies, for the tests' sake

def run_tests(folder, *tests):
    """(exit code, output) of pytest on some tests in a folder; -1 where they ran too long.

    One thread; no plugins, which take a third of the time; no bytecode, because two versions of a file that have one
    size and were written within a second are one to Python's cache; plain asserts, because pytest's picture of how two
    lists of thousands of numbers differ can take minutes.
    """
    more = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--color=no", *dict.fromkeys(tests)]
    try:
        done = subprocess.run(command, cwd=folder, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT * len(tests),
                              text=True, encoding="utf-8", errors="replace")
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        return -1, f"more than {TIMEOUT} seconds"


def hunt(chosen, root=ROOT, jobs=2, say=print):
    """Plant the mutants one at a time in copies of the project and run the test of each. Returns those that were missed.

    A test that is red without a bug proves nothing, so all of them are run on the untouched copy first.
    """
    if (root / BACKUP).exists():
        raise Stop("something is planted here; first: python tools/mutants.py undo")
    texts, start, missed = {m: mutated(m, root) for m in chosen}, time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copies = queue.SimpleQueue()
        for i in range(jobs):
            folder = Path(temporary) / f"copy{i}" / "project"        # where tests look for ../shared, there is none
            shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
            copies.put(folder)
        folder = copies.get()
        code, output = run_tests(folder, *(m.test for m in chosen))
        copies.put(folder)
        if code or re.search(r"\d+ skipped", output):
            raise Stop(f"without any bug the tests must be green, and none skipped:\n{output[-3000:]}")

        def one(mutant):
            folder = copies.get()
            original = read(folder, mutant.file)
            write(folder, mutant.file, texts[mutant])
            code, output = run_tests(folder, mutant.test)
            write(folder, mutant.file, original)
            copies.put(folder)
            return code, output

        with ThreadPoolExecutor(jobs) as pool:
            for mutant, (code, output) in zip(chosen, pool.map(one, chosen)):
                say(f"{'caught' if code == 1 else 'MISSED'}  {MUTANTS.index(mutant) + 1:3}  {mutant.file:10} {mutant.name}")
                if code != 1:                            # 0: green; anything else: pytest itself could not run
                    missed.append(mutant)
                    say(f"        {mutant.test}" + (f"\n{output[-2000:]}" if code else " is green"))
    say(f"{len(chosen) - len(missed)} of {len(chosen)} caught in {time.perf_counter() - start:.0f} s")
    return missed


# ------------------------------------------------------------------------------------------------ the command

def numbered(text):
    """The mutants that '7' or '3,7,12' means."""
    numbers = [int(n) for n in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else [0]
    if not all(1 <= n <= len(MUTANTS) for n in numbers):
        raise Stop(f"{text!r} is not a number from 1 to {len(MUTANTS)}; see: python tools/mutants.py list")
    return [MUTANTS[n - 1] for n in numbers]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="all", help="all, list, a number, station, hint, guess, reveal or undo")
    parser.add_argument("which", nargs="?", default="", help="with station: 1 to 6 or 2b; with guess: a function")
    parser.add_argument("--only", default="", metavar="3,7", help="with all: only these")
    parser.add_argument("--jobs", type=int, default=2, help="with all: so many at a time (default 2), each on one thread")
    parser.add_argument("--force", action="store_true", help="with undo: even if the file was worked on since")
    given = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)
    if given.what == "all":
        return 1 if hunt(numbered(given.only) if given.only else MUTANTS, jobs=max(1, given.jobs)) else 0
    if given.what == "list":
        for i, m in enumerate(MUTANTS, 1):
            print(f"{i:3}  {m.file:10} {m.name}{f'   <- station {m.station}' if m.station else ''}\n{'':16}{m.test}")
    elif given.what == "undo":
        print(f"as it was: {undo(ROOT, given.force)}")
    elif given.what == "hint":
        print(next_hint(ROOT))
    elif given.what == "guess":
        print(guessed(planted(ROOT)["file"], planted(ROOT)["where"], given.which))
    elif given.what == "reveal":
        print(planted(ROOT)["reveal"])
    elif given.what == "station":
        plant(ROOT, of_station(given.which), given.which)
        print(f"Station {given.which}: a bug is planted in one of losses.py, buffer.py and sapo.py. Train, look, and find it.\n"
              "python tools/mutants.py hint | guess FUNCTION | reveal | undo")
    else:
        mutant, = numbered(given.what)[:1]
        function = where(mutant, ROOT)
        plant(ROOT, mutant)
        print(f"{f'Station {mutant.station}. ' if mutant.station else ''}A bug is in {mutant.file} now. Open the function {function}.\n"
              f"This test turns red:  python -m pytest -x \"{mutant.test}\"\n"
              f"To undo:              python tools/mutants.py undo")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stop as reason:
        sys.exit(f"mutants: {reason}")
