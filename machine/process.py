"""The process of a run: signals that ask it to stop, a screen that may break, and the one line with which it
ends.

Imports nothing that takes long, so that signals are minded while torch is imported.
"""

import os
import shlex
import signal
import sys
from contextlib import suppress


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved what there was. Nothing that handles errors handles it."""
    code = 0


class Diverged(Exception):
    """Too many steps in a row were not finite."""
    code = 3


class Signals:
    """What asks this process to stop. While nothing would be lost, `at_once`, it stops there and then; else
    where it is polled. asked: the signal, or None; again: the command that goes on, where there is a run."""

    def __init__(self):
        self.asked, self.at_once = None, False
        self.again = ""

    def mind(self):
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):              # Windows lacks the last two
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:        # nohup has SIGHUP ignored
                signal.signal(number, self.ask)

    def ask(self, signum=None, frame=None):
        if self.asked == signal.SIGINT == signum and not self.at_once:
            raise KeyboardInterrupt                      # a second one stops at once
        self.asked = signum or self.asked
        if self.asked and self.at_once:
            self.at_once = False
            raise Stopped("stopped before the first step; "
                          + (f"go on with: {self.again}" if self.again else "nothing was written"))

    def stop_at_once(self):
        """From here on until training begins; also for a signal that came before."""
        self.at_once = True
        self.ask()


signals = Signals()


class Screen:
    """A stream that shows ? for what it cannot encode, and is silent once nobody can read it: no run ends for
    its screen."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")    # none: it was closed before the start
        self.stream.reconfigure(errors="replace")

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *text):
        try:
            return function(*text)
        except OSError:                                  # a closed pipe, a terminal that is gone, a full disk
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def printable(s, kept=""):
    """A text without what steers a screen, `kept` aside: what a file or a model says must not."""
    kept += "\xa0\u200c\u200d\u3000"                     # two blanks, and what joins letters or parts them
    return "".join(c if c.isprintable() or c in kept else "\ufffd" for c in s)


def one_line(s, width):
    """A text in one line, its middle left out."""
    s = printable(" ".join(s.split()))
    return s if len(s) <= width else s[:width // 2 - 1] + " … " + s[-(width // 2 - 2):]


def say(kind, text, always=False):
    """One line on the error stream, from the first process alone unless `always`."""
    if always or int(os.environ.get("RANK", 0)) == 0:
        print(kind + one_line(str(text), 700), file=sys.stderr)


def begin():
    """Called by the program before anything that takes long is imported."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    signals.mind()


def command(*arguments):
    """How a person starts this program with these arguments, under torchrun or not."""
    program = "python train.py"
    if "RANK" in os.environ:
        each = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        nodes = int(os.environ["WORLD_SIZE"]) // each
        program = f"torchrun{f' --nnodes={nodes}' if nodes > 1 else ''} --nproc_per_node={each} train.py"
    return f"{program} {shlex.join(map(str, arguments))}"
