"""The little that the emulator and the lint need to understand of Metal source text."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter.

    Attributes:
        type: As declared, such as ``const device float*``.
        name: Likewise.
        is_reference: Whether it is bound as ``T&`` rather than ``T*``.
        attribute: Such as ``buffer(0)`` or ``thread_position_in_grid``.
    """

    type: str
    name: str
    is_reference: bool
    attribute: str

    @property
    def is_attribute(self) -> bool:
        """Whether the GPU supplies it, rather than a buffer."""
        return not self.attribute.startswith("buffer(")


def kernel_parameters(text: str, name: str) -> list[Parameter]:
    """The parameters of ``[[kernel]] void name(...)``."""
    text = without_comments(text)
    head = re.search(rf"\[\[kernel\]\]\s+void\s+{name}\s*\(", text)
    if head is None:
        raise ValueError(f"[emulator] The text must hold a kernel called {name}, but holds none.")
    declared = text[head.end() : closing_bracket(text, head.end() - 1)]
    parameters = re.findall(r"([^\[\]]*?)(\w+)\s*\[\[(.*?)\]\]\s*(?:,|$)", declared, re.DOTALL)
    return [
        Parameter(" ".join(type_.split()), name, "&" in type_, attribute)
        for type_, name, attribute in parameters
    ]


def without_comments(text: str) -> str:
    """Blank out comments, so that every other character keeps its place."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/",
        lambda comment: re.sub(r"[^\n]", " ", comment[0]),
        text,
        flags=re.DOTALL,
    )


def without_host_names(text: str) -> str:
    """Make MLX's explicit instantiations plain C++, which allows no attribute in that place."""
    return re.sub(r"template \[\[host_name\([^)]*\)\]\] \[\[kernel\]\]", "template", text)


def line_of(text: str, position: int) -> int:
    """The number of the line of a character, from 1."""
    return text.count("\n", 0, position) + 1


def closing_bracket(text: str, opening: int) -> int:
    """Index of the bracket that closes the one at ``opening``."""
    brackets = {"(": ")", "{": "}"}
    open_, close = text[opening], brackets[text[opening]]
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == open_) - (text[i] == close)
        if depth == 0:
            return i
    raise ValueError(f"[emulator] The bracket {open_} at character {opening} is never closed.")


_TYPE = r"\w[\w:]*(?:\s*<[^;{}]*>)?"
_DECLARATOR = r"\w+(?:\s*\[[^\];]*\])*"
SHARED_VARIABLES = re.compile(
    rf"(?:^|(?<=[;{{}}]))(?P<space>\s*)threadgroup\s+(?P<type>{_TYPE})\s+"
    rf"(?P<declarators>{_DECLARATOR}(?:\s*,\s*{_DECLARATOR})*)\s*;",
    re.MULTILINE,
)
# The same anywhere else or in another form: a name follows the type, not a `*` or `&`.
_UNKNOWN_FORM = re.compile(
    rf"\bthreadgroup\s+(?:(?:const|volatile)\s+)*(?!const|volatile){_TYPE}\s+\w[^;]*"
)


class ThreadgroupVariableError(ValueError):
    """A threadgroup variable is declared in a way that Metal or the emulator does not take."""

    def __init__(self, line: int, declaration: str) -> None:
        super().__init__(
            "A threadgroup variable must be a statement `threadgroup T name[n];` without "
            f"initialiser, but line {line} has `{declaration};`."
        )
        self.line = line


def share_threadgroup_variables(
    text: str, declare: str = "EMULATOR_SHARED_VARIABLE({name});"
) -> str:
    """Rewrite ``threadgroup T a[4], b;`` so that all threads of a group get the same memory.

    To C++ such a declaration is a local variable. Lines keep their numbers.

    Args:
        text: Metal source.
        declare: What to write for each variable, after a type ``{name}_type``.
    """

    def rewrite(match: re.Match[str]) -> str:
        written = []
        for declarator in re.findall(_DECLARATOR, match["declarators"]):
            name = declarator.split("[")[0].strip()
            dimensions = declarator[len(name) :]
            written.append(f"typedef {match['type']} {name}_type{dimensions};")
            written.append(declare.format(name=name))
        return match["space"] + " ".join(written)

    text = SHARED_VARIABLES.sub(rewrite, without_comments(text))
    if unknown := _UNKNOWN_FORM.search(text):
        raise ThreadgroupVariableError(line_of(text, unknown.start()), unknown[0])
    return text
