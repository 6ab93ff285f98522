"""Docstrings for Markdown: their tables become blocks of text, and their < are not taken for HTML."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TABLE = re.compile(r"^( *)=+(?: +=+)+ *\n.*?^ *=+(?: +=+)+ *$", re.M | re.S)
_RULE = re.compile(r"^=+(?: +=+)+$")
_CODE = re.compile(r"(```.*?```|``.*?``|`.*?`)", re.S)


def _block(match: re.Match[str]) -> str:
    lines = [line[len(match.group(1)) :] for line in match.group(0).splitlines()]
    lines = ["-" * len(line) if _RULE.match(line) else line for line in lines[1:-1]]
    return "\n".join(["```text", *lines, "```"])


def for_markdown(text: str) -> str:
    # A table's inner rule would end the match: two runs of the pattern meet where one ends and the next
    # begins.
    while (found := _TABLE.search(text)) is not None:
        rest = text[found.end() :]
        body = re.match(r"\n(?:(?!^\n).*\n)*? *=+(?: +=+)+ *$", rest, re.M)
        whole = found.group(0) + (body.group(0) if body and "\n\n" not in body.group(0) else "")
        text = text.replace(whole, _block(re.match(r"^( *)(.*)$", whole, re.S)), 1)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in _CODE.split(text))


class ForMarkdown(griffe.Extension):
    """Applied to every object as it is read."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """An operation that gets its arguments from the function behind it (zokernels/ops/arguments.py)
        shows them.
        """
        if any(str(d.value) in ("in_place(_call)", "out_of_place(_call)") for d in func.decorators):
            own = [p for p in func.parameters if p.kind is griffe.ParameterKind.positional_or_keyword]
            func.parameters = griffe.Parameters(*own, *list(func.parent["_call"].parameters)[2:])

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = for_markdown(obj.docstring.value)
