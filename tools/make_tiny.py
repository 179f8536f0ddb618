"""Makes the tiny world: data/tiny_{base,train,validation,test}.jsonl and data/tiny_model/ (a config and a tokenizer, no weights). Short stories with many right wordings and facts a program can check.

A prompt states a name, a coloured thing, an animal and a place; a story mentions each at least twice, and its pronouns agree with the name.
`verifier` lists the words a story must and must not hold. Train, validation and test rows are clean, and no combination of facts in validation
or test occurs in train or base. A train row also holds `rejected`, a story by the base's author with a slip: offline DPO and ORPO need it, SAPO never looks.

The base rows, from which the starting model learns to write, hold slips: later mentions get a fact wrong. The slips are habits: half of the
values of each domain slip, always to the same wrong value (half of the names: to the other pronoun). Independent slips would be averaged
away by greedy decoding, and the base would be right at once; a fixed wrong value is a habit, and has to be unlearned.
"""
import argparse
import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DOMAINS = {"colour": "red blue green yellow purple pink black white brown gray".split(),
           "thing": "ball drum boat kite hat scarf bell book basket bucket lantern doll".split(),
           "animal": "dog cat rabbit fox goat lamb duck pony".split(),
           "place": "beach lake park playground farm market castle station harbor meadow".split()}
HABITS = {field: dict(zip(values[::2], values[1::2])) for field, values in DOMAINS.items()}       # red -> blue, green -> yellow, ...
GIRLS = "Mia Lucy Nora Zoe Clara Tina Molly Julia Sara Hannah".split()
BOYS = "Ben Tom Leo Paul Noah Felix Hugo Peter Simon David".split()
WRONG_PRONOUN = GIRLS[::2] + BOYS[::2]
SHE = {"they": "she", "their": "her", "them": "her", "They": "She", "Their": "Her"}
HE = {"they": "he", "their": "his", "them": "him", "They": "He", "Their": "His"}
FIELDS = {"name": GIRLS + BOYS, **DOMAINS}
SLIP = 0.6                                                       # how often a fact with a habit slips, in base rows

PROMPTS = [
    "Tell a story about {name}, a {colour} {thing}, a {animal} and the {place}.",
    "Write a short story with {name}, a {animal}, a {colour} {thing} and the {place}.",
    "Please tell me what {name} did at the {place} with a {animal} and a {colour} {thing}.",
    "A {colour} {thing}, a {animal}, the {place} and {name}: make up a story."]

# A story is one sentence from each slot of an opening, of a plot, and an ending. {they}, {their}, {them} are the child's own pronouns.
CHILD_AND_THING = [
    "{name} carried {their} {colour} {thing} to the {place}.", "One sunny day, {name} took a {colour} {thing} to the {place}.",
    "{name} found a {colour} {thing} on the way to the {place}.", "{name} was at the {place} with {their} new {colour} {thing}.",
    "Early one day, {name} brought a {colour} {thing} to the {place}.", "At the {place}, {name} had a {thing}, and it was all {colour}.",
    "At the {place}, {name} sat down with {their} {colour} {thing}.", "After breakfast, {name} ran to the {place} with a {colour} {thing}."]
THEN_ANIMAL = [
    "Soon a {animal} came and looked at {them}.", "There {they} met a {animal} with muddy feet.",
    "A little {animal} followed {them} everywhere.", "A friendly {animal} was waiting there for {them}.",
    "A curious {animal} sniffed {their} shoes.", "{They} shared {their} lunch with a {animal}.",
    "Behind a tree, {they} saw a {animal}.", "{Their} best friend there was a {animal}."]
CHILD_AND_ANIMAL = [
    "{name} and a {animal} went to the {place} together.", "At the {place}, {name} made friends with a {animal}.",
    "One morning, {name} found a lonely {animal} at the {place}.", "A {animal} lived near the {place}, and {name} came to visit.",
    "One Sunday, {name} saw a {animal} at the {place}.", "{name} was near the {place} when a {animal} came along.",
    "Once upon a time, {name} and a {animal} lived near the {place}.", "On the way to the {place}, {name} met a {animal}."]
THEN_THING = [
    "{They} had brought {their} {colour} {thing}.", "In {their} hands was a {colour} {thing}.",
    "That day {they} had a new {thing}, and it was {colour}.", "{Their} uncle had given {them} a {colour} {thing}.",
    "{They} carried a {thing} that was {colour} all over.", "The best thing {they} owned was a {colour} {thing}.",
    "{They} pulled a {colour} {thing} out of {their} bag.", "{They} held up {their} {colour} {thing} for it to see."]
ALL_AT_ONCE = [
    "{name} went to the {place} with {their} {colour} {thing} and met a {animal} on the way.",
    "One day at the {place}, {name} showed {their} {colour} {thing} to a {animal}.",
    "{name} and a {animal} took a {colour} {thing} to the {place} one sunny morning.",
    "A {animal} was resting at the {place} when {name} came by with {their} {colour} {thing}.",
    "At the {place}, a friendly {animal} ran up to {name} and {their} {colour} {thing}.",
    "Once upon a time, {name} had a {colour} {thing}, a pet {animal} and a house near the {place}.",
    "One windy day, {name} followed a {animal} to the {place} and brought {their} {colour} {thing}.",
    "{name} loved the {place}, a small {animal} and {their} {colour} {thing} more than anything else."]
LOST = [
    "Suddenly the wind took the {thing} out of {their} hands.", "Then {they} looked around, and the {thing} was gone.",
    "After {their} nap, the {colour} {thing} was missing.", "But soon the {thing} was lost, and {name} was sad.",
    "{They} put the {thing} down and forgot where.", "But {they} lost the {thing} somewhere near the {place}.",
    "{They} cried when the {colour} {thing} disappeared.", "Oh no, {they} had dropped {their} {thing} on the path!"]
FOUND = [
    "The {animal} looked everywhere and came back with something {colour}.", "The clever {animal} saw something {colour} under a bench.",
    "At last the {animal} found the {colour} {thing} behind a wall.", "The {animal} searched until something {colour} turned up.",
    "With the {animal} in front, {they} soon spotted something {colour}.", "The good {animal} found it, still {colour} and clean.",
    "Luckily the {animal} had kept the {colour} {thing} safe for {them}.", "The {animal} saw a bit of {colour} nearby, and {they} cheered."]
GAME = [
    "The {animal} looked at the {thing} and wanted to play.", "{They} let the {animal} touch the {thing}, and it was gentle.",
    "At first the {animal} was afraid of the {colour} {thing}.", "{name} put the {thing} on the ground and waited.",
    "{They} hid the {thing} behind {their} back for a game.", "{They} wondered if the {animal} would like the {thing}.",
    "{They} made up a game with the {thing}.", "{name} said the {thing} was magic, and {they} made a wish."]
FRIENDS = [
    "Soon the {animal} danced around the {colour} {thing}, and {they} laughed.", "The {animal} made a silly sound at the {colour} {thing}.",
    "Then the {animal} came closer, for {colour} was its favorite color.", "Soon the {animal} fell asleep beside {their} {colour} treasure.",
    "Before long, the {animal} would not leave the {colour} {thing} alone.", "As a thank you, the {animal} gave {them} a {colour} stone.",
    "From then on, the {animal} loved {colour} things, just like {them}.", "In the end, the {animal} liked {colour} as much as {they} did."]
ENDINGS = [
    "{name} waved goodbye to the {place} and took {their} {thing} home.", "{name} left the {place} with a smile on {their} face.",
    "{name} hugged the {animal}, and {they} never forgot the {place}.", "That night, {name} dreamed of the {place} and {their} {animal}.",
    "In the evening, {name} told {their} mother about the {place}.", "{name} sang all the way home from the {place} with {their} {animal}.",
    "{They} promised to come back to the {place}, and {name} did.", "Then {name} and the {animal} ran home from the {place}.",
    "So {name} stayed at the {place} until {their} father called.", "When the {place} grew quiet, {name} took {their} {animal} home.",
    "Everybody at the {place} clapped for {name} and {their} {animal}.", "Now {name} goes to the {place} every day with {their} {thing}."]
OPENINGS = [[CHILD_AND_THING, THEN_ANIMAL], [CHILD_AND_ANIMAL, THEN_THING], [ALL_AT_ONCE]]
PLOTS = [[LOST, FOUND], [GAME, FRIENDS]]


def wording(rng):
    """A story with its facts left open: 38 to 50 words, every fact at least twice, three pronouns or more and a subject among them."""
    while True:
        text = " ".join(rng.choice(slot) for slot in [*rng.choice(OPENINGS), *rng.choice(PLOTS), ENDINGS])
        if (38 <= len(text.split()) <= 50 and all(text.count(f"{{{field}}}") >= 2 for field in FIELDS)
                and "{they}" in text.lower() and len(re.findall("{the", text.lower())) >= 3):
            return text


def balanced(rng, n):
    """n combinations of facts in which each domain's values occur equally often, within one."""
    decks = [(rng.sample(values, len(values)) * n)[:n] for values in FIELDS.values()]
    return list(zip(*(rng.sample(deck, n) for deck in decks)))


def slips(rng, facts):
    """What the later mentions say instead of the facts: {} if nothing slips."""
    wrong = {field: habit[facts[field]] for field, habit in HABITS.items() if facts[field] in habit and rng.random() < SLIP}
    return wrong | ((HE if facts["name"] in GIRLS else SHE) if facts["name"] in WRONG_PRONOUN and rng.random() < SLIP else {})


def fill(text, facts, wrong):
    """Each fact's first mention is right, the later ones come from wrong; a pronoun's first mention is the name itself."""
    facts = facts | (SHE if facts["name"] in GIRLS else HE)
    for field, value in facts.items():
        text = text.replace(f"{{{field}}}", value, 0 if field in SHE else 1).replace(f"{{{field}}}", wrong.get(field, value))
    return text


def verifier(facts):
    right, other = (SHE, HE) if facts["name"] in GIRLS else (HE, SHE)
    must_not = [value for field, values in FIELDS.items() for value in values if value != facts[field]]
    return {"must": [*facts.values(), right["they"]], "must_not": must_not + sorted({other[form] for form in ("they", "their", "them")})}


def passes(text, verifier):
    words = set(re.findall(r"\w+", text.lower()))
    return words.issuperset(map(str.lower, verifier["must"])) and words.isdisjoint(map(str.lower, verifier["must_not"]))


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}


def write_model(folder, texts, config=CONFIG):
    """config.json, a byte-level BPE trained on the texts, and a chat template: what --from-scratch starts from."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=config["vocab_size"], special_tokens=SPECIAL, show_progress=False,
                                                             initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    for name, value in (("config", config), ("generation_config", {"bos_token_id": 0, "eos_token_id": 1}), ("tokenizer_config", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>", "model_max_length": 512,
            "clean_up_tokenization_spaces": False})):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def options(doc):
    """--out, a folder that is there then, and --seed."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main():
    args = options(__doc__)
    rng, others = random.Random(args.seed), random.Random(args.seed + 1)

    clean = []
    while len(set(clean)) < 600:                                 # again, until no combination occurs twice
        clean = balanced(rng, 300) + balanced(rng, 100) + balanced(rng, 200)
    base = []
    while len(base) < 3000:
        facts = tuple(rng.choice(values) for values in FIELDS.values())
        base += [facts] if facts not in clean[300:] else []

    texts = []
    for split, rows in {"base": base, "train": clean[:300], "validation": clean[300:400], "test": clean[400:]}.items():
        stories, passed = [], 0
        with open(args.out / f"tiny_{split}.jsonl", "w", newline="\n") as file:
            for facts in rows:
                facts = dict(zip(FIELDS, facts))
                story = fill(wording(rng), facts, slips(rng, facts) if split == "base" else {})
                row = {"prompt": rng.choice(PROMPTS).format(**facts), "chosen": story}
                if split == "train":                                     # a slip or more: for offline DPO and ORPO, never for SAPO
                    other = others.choice([c for c in DOMAINS["colour"] if c != facts["colour"]])
                    while passes(worse := fill(wording(others), facts, slips(others, facts) or {"colour": other}), verifier(facts)):
                        pass
                    row["rejected"] = worse
                if split != "base":
                    row["verifier"] = verifier(facts)
                    assert passes(story, row["verifier"]), row
                stories.append(story)
                texts += [row["prompt"], story] if split in ("base", "train") else []
                passed += passes(story, verifier(facts))
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
        words = sum(len(story.split()) for story in stories) / len(rows)
        print(f"{split}: {len(rows)} rows, {len(set(stories))} distinct stories, {words:.1f} words a story, "
              f"{passed / len(rows):.1%} pass the verifier")
    write_model(args.out / "tiny_model", texts)


if __name__ == "__main__":
    main()
