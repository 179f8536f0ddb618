"""Talk to a trained model: one prompt, or turn by turn, with the checkpoint's chat template.

    python tools/chat.py runs/NAME                        turn by turn; Ctrl-C stops an answer, Ctrl-D ends (Windows: Ctrl-Z)
    python tools/chat.py runs/NAME --compare BASE         two models, one after the other
    python tools/chat.py runs/NAME --prompt "..."         one answer, for scripts; --prompt - reads it from the standard input

A model is a run's folder (its model/ is taken), a Hugging Face folder, or a hub name[@revision]. Without a terminal each line of
the standard input is a turn. An empty turn begins a new conversation. A checkpoint without a chat template goes on from
the text as it stands, yours and its own. Answers are generated as training generates B', by `generate`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from machine.config import read_config
from machine.files import BadInput
from machine.flags import DEVICES
from machine.folders import BESIDE, WEIGHTS, companions, fetch, load_pretrained
from machine.parallel import World
from machine.process import printable
from machine.text import Text
from model import generate


class Speaker:
    """A model, its text, and a conversation with it."""

    def __init__(self, name, seed):
        self.name, self.folder, self.turns = name, find(name), []
        self.text = Text(companions(self.folder), self.folder, read_config(self.folder))
        self.rng = torch.Generator().manual_seed(seed)

    def load(self, device, dtype):
        self.model = load_pretrained(self.folder, dtype, device).eval()

    def prompt(self):
        """The ids that the conversation has become: as the template opens the answer, or the text as it stands."""
        if self.text.template:
            said, head = self.text.render(self.turns, True), []
        else:
            said, head = "".join(turn["content"] for turn in self.turns), self.text.head
        ids = head + self.text.ids([said])[0]
        return ids or [self.text.bos if self.text.bos is not None else self.text.end]

    def answer(self, words, args):
        """Add a turn, generate the answer to it while it is shown, and add that. Returns (tokens, seconds)."""
        self.turns.append({"role": "user", "content": words})
        try:
            prompt = self.prompt()
            room = self.model.config.max_position_embeddings - len(prompt)
            if room < 1:
                raise BadInput(f"the conversation has {len(prompt)} tokens, and the model's context ends at "
                               f"{self.model.config.max_position_embeddings}; begin a new one")
        except BadInput:
            self.turns.pop()
            raise
        screen, began = Screen(self.text), time.perf_counter()
        try:
            ids = generate(self.model, [prompt], [min(args.max_new_tokens, room)], self.text.eos, args.temperature, args.top_k,
                           args.top_p, self.rng, self.text.vocab, see=screen.see)[0]
        except KeyboardInterrupt:        # what was said until then stands
            ids = screen.ids
        screen.end(ids)
        self.turns.append({"role": "assistant", "content": self.text.decode(ids, True)})
        return len(ids), time.perf_counter() - began


class Screen:
    """Shows a text while its tokens come: what is settled, without half a character, and nothing that steers a terminal."""

    def __init__(self, text):
        self.text, self.ids, self.shown = text, [], ""

    def see(self, tokens):
        if self.ids and self.ids[-1] in self.text.eos:   # a GPU goes on for some tokens, until it is asked
            return
        self.ids.append(tokens[0].item())
        self.show(self.text.decode(self.ids, True).rstrip("\ufffd"))     # a character may need several tokens

    def show(self, whole):
        if whole.startswith(self.shown):
            new = whole[len(self.shown):]
            print(printable(new, "\n\t"), end="", flush=True)
            self.shown = whole

    def end(self, ids):
        self.show(self.text.decode(ids, True))
        print(flush=True)


def find(name):
    """The model folder that a run, a folder or a hub name stands for."""
    path = Path(name)
    if (path / "source").is_dir() and (path / "metrics.jsonl").is_file():
        if not (path / "model").is_dir():
            raise BadInput(f"{path}: this run has not written its model/ yet; it does when it ends: python train.py --resume {path}")
        return path / "model"
    try:
        return path if path.is_dir() else fetch(name, BESIDE + WEIGHTS)
    except BadInput as error:
        raise BadInput(str(error).removeprefix("--model ")) from None


def turns(args):
    """What is said, turn by turn."""
    if args.prompt:
        said = sys.stdin.read().strip("\n") if args.prompt == "-" else args.prompt
        yield said.encode(errors="replace").decode()     # what is not UTF-8 is no text
        return
    while True:
        try:
            yield input("\n> " if sys.stdin.isatty() else "").encode(errors="replace").decode()
        except (EOFError, KeyboardInterrupt):
            return


def converse(args, speakers):
    for words in turns(args):
        if not words.strip() and not args.prompt:
            print("(a new conversation)", file=sys.stderr)
            for speaker in speakers:
                speaker.turns.clear()
            continue
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"-- {speaker.name}")
            try:
                tokens, seconds = speaker.answer(words, args)
            except BadInput as error:
                if args.prompt or not sys.stdin.isatty():
                    raise
                print(f"chat: {error}", file=sys.stderr)
                continue
            if args.time:
                print(f"({tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s)", file=sys.stderr)


def settings(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", help="run folder, model folder, or hub name")
    parser.add_argument("--compare", metavar="BASE", help="a second one, which answers the same")
    parser.add_argument("--prompt", help="answer this and end; - reads it from the standard input")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at most [256]")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy [0.7]")
    parser.add_argument("--top-k", type=int, default=50, help="0 keeps all [50]")
    parser.add_argument("--top-p", type=float, default=0.95, help="1 keeps all [0.95]")
    parser.add_argument("--seed", type=int, default=42, help="the same seed and turns give the same answers [42]")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="[auto: cuda where there is one]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[auto: bfloat16 on cuda, else float32]")
    parser.add_argument("--time", action="store_true", help="say how fast each answer came")
    args = parser.parse_args(argv)
    for flag, value, low, high in (("--max-new-tokens", args.max_new_tokens, 1, 10**9), ("--temperature", args.temperature, 0, 1e9),
                                   ("--top-k", args.top_k, 0, 10**9), ("--top-p", args.top_p, 1e-6, 1), ("--seed", args.seed, 0, 2**63 - 1)):
        if not low <= value <= high:
            raise BadInput(f"{flag} is {value}; it must be from {low:g} to {high:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees none here; use --device cpu")
    if args.prompt is not None and not args.prompt.strip():
        raise BadInput("--prompt is empty; say something, or leave it out to talk turn by turn")
    return args


def main(argv=None):
    try:
        args = settings(argv)
        if hasattr(sys.stdin, "reconfigure"):            # not where a notebook or a test stands in for it
            sys.stdin.reconfigure(errors="replace")
        device = World(args.device).device
        half = args.dtype == "bfloat16" or args.dtype == "auto" and device.type == "cuda"
        speakers = [Speaker(name, args.seed) for name in filter(None, (args.model, args.compare))]
        for speaker in speakers:         # once both are known to be there
            speaker.load(device, torch.bfloat16 if half else torch.float32)
        if not args.prompt and sys.stdin.isatty():
            ends = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
            how = "with its chat template" if speakers[0].text.template else "as plain text, for it has no chat template"
            print(f"{args.model}, {how}. An empty line begins a new conversation, Ctrl-C stops an answer, {ends} ends.")
        converse(args, speakers)
        return 0
    except BrokenPipeError:              # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInput, OSError, RuntimeError) as error:
        print("chat: " + " ".join(str(error).split())[:400], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
