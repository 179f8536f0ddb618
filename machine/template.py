"""A chat template: where it stands, and jinja2's sandbox set up as transformers has it."""

import datetime
import json
import re
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from machine.files import BadInput


def find_template(files, settings, template_file):
    """The chat template's source, or "": --chat-template's, chat_template.jinja, or the tokenizer's."""
    if template_file:
        try:
            return Path(template_file).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"--chat-template {template_file}: cannot be read ({error})") from None
    try:
        source = files.get("chat_template.jinja", b"").decode("utf-8")
    except UnicodeError:
        raise BadInput("chat_template.jinja is not UTF-8 text; save it as such") from None
    source = source or settings.get("chat_template") or ""
    if isinstance(source, list):         # [{name, template}, ...]: take the default one
        named = {str(t.get("name"))[:40]: t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
        if not source:
            raise BadInput(f"none of the checkpoint's chat templates ({', '.join(named)}) is named default; "
                           "save the one to use to a file and give it by --chat-template FILE")
    return source


def compile_template(source):
    """A chat template in jinja2's immutable sandbox, with transformers' filters and globals.

    `strftime_now` always says 26 July 2024, so that every run sees the same text. The sandbox keeps a
    template from reaching anything. It does not keep it from taking long.
    """
    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": datetime.datetime(2024, 7, 26).strftime}
    try:
        # {% generation %} marks the assistant's tokens for others; here it renders what it holds
        source = re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})", r"\1\2with", source)
        return environment.from_string(source)
    except Exception as error:           # constants are folded here, so this can raise anything as well
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"the chat template is not valid Jinja: {reason}") from None
