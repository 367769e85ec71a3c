"""The text that measurements read if the user gives none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pydoc_data.topics import topics

# Topics of pydoc_data that hold connected prose, in the order they are read. The list is fixed so
# that the text changes only if CPython's documentation does.
_TOPICS = (
    "objects",
    "execmodel",
    "import",
    "types",
    "exceptions",
    "calls",
    "compound",
    "typesseq",
    "formatstrings",
    "debugger",
)
# An indented line, a bullet, a number, a change note, or a character of code or markup.
_NOT_PROSE = re.compile(
    r"^\s|^\* |^[\d.-]|^\w+ in version|^Deprecated|::|>>>|[=`{}|\\<>#@_]", re.MULTILINE
)


def default_text() -> str:
    """Return English prose that every CPython contains: paragraphs of the language reference.

    The paragraphs come from ``pydoc_data.topics``, from a fixed list of topics in a fixed order. A
    paragraph counts as prose if it has at least 160 characters, starts with a capital and ends with
    a full stop, and has no indentation, bullets, change notes or characters of code. The text
    has about 40,000 characters, 8,500 tokens of SmolLM2. Its wording differs a little between
    versions of CPython, so compare only numbers from one minor version.
    """
    paragraphs = (paragraph for name in _TOPICS for paragraph in _prose(topics.get(name, "")))
    return "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat each other


def _prose(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if _NOT_PROSE.search(paragraph):
            continue
        line = re.sub(r"\*(\w[^*]*)\*", r"\1", " ".join(paragraph.split()))
        if len(line) >= 160 and line[0].isupper() and line.endswith("."):
            yield line
