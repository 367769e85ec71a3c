"""Find what Apple's compiler would reject in Metal source and g++ does not.

Clang compiles the text as "C++ for OpenCL", which knows address spaces and lacks the same parts of
C++ as Metal; ``msl/lint.h`` declares Metal's library to it. Rules that OpenCL does not share are
looked up in the text.
"""

import re
import subprocess
from collections.abc import Iterator

from . import msl_text, toolchain

COMPILER = "clang-19"

# How clang reads Metal behind msl/lint.h.
LANGUAGE = (
    "-xclcpp",
    "-cl-std=clc++2021",
    "-cl-no-stdinc",
    # No double and no pipes. Pointers without an address space, which may point anywhere, stay:
    # without them clang cannot copy structs. They are looked up in the text instead.
    "-Xclang",
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_int64,+__opencl_c_generic_address_space",
)
_FLAGS = (
    *LANGUAGE,
    "-fsyntax-only",
    "-target",
    "x86_64-linux-gnu",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Winfinite-recursion",
)

_ADDRESS_SPACE = re.compile(r"\b(?:device|constant|thread|threadgroup)\b")
_BUILT_IN_TYPE = (
    r"(?:float|half|bfloat|u?(?:char|short|int|long))(?:[234])?|bool[234]?|void|auto|"
    r"u?int(?:8|16|32|64)_t|b?float16_t|size_t|vec|simdgroup_matrix"
)
_DEFINED_TYPE = re.compile(r"\b(?:typename|class|struct|using)\s+(\w+)|\btypedef\b[^;]*?(\w+)\s*;")


def lint(text: str) -> list[str]:
    """Complaints about Metal source, as ``line N: what is wrong``; empty if there are none.

    Templates are checked as far as the text instantiates them; the text that MLX generates
    instantiates its kernel.

    Args:
        text: What MLX would hand to Apple's compiler: ``EmulatedKernel.metal_text(...)``.

    Raises:
        CompilerMissingError: If clang-19 is not installed.
    """
    text = msl_text.without_comments(text)
    found = [
        *_pointers_without_address_space(text),
        *_misplaced_threadgroup_variables(text),
        *_forbidden_statements(text),
        *_complaints_of_clang(text),
    ]
    return [f"line {line}: {message}" for line, message in sorted(found)]


def _complaints_of_clang(text: str) -> Iterator[tuple[int, str]]:
    clang = toolchain.require_compiler(COMPILER, f"Install it: apt-get install {COMPILER}")
    try:
        text = msl_text.share_threadgroup_variables(text, "LINT_SHARED_VARIABLE({name});")
    except msl_text.ThreadgroupVariableError as error:
        yield error.line, f"error: {error}"
        return
    text = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal\w*>", "", text, flags=re.MULTILINE)
    text = msl_text.without_host_names(text)
    result = subprocess.run(
        [clang, *_FLAGS, f"-I{toolchain.HERE / 'msl'}", "-"],
        input=f'#include "lint.h"\n#line 1 "kernel"\n{text}',
        capture_output=True,
        text=True,
        check=False,
    )
    for line in result.stderr.splitlines():
        if complaint := re.match(r"(\S+?):(\d+):\d+: ((?:fatal )?(?:error|warning): .*)", line):
            file, number, message = complaint.groups()
            yield int(number) if file == "kernel" else 0, message
    if result.returncode and "error: " not in result.stderr:
        raise RuntimeError(f"[lint] {COMPILER} failed: {result.stderr}")


def _pointers_without_address_space(text: str) -> Iterator[tuple[int, str]]:
    """Clang would let such a pointer point anywhere; Apple's compiler rejects it."""
    defined = {name for pair in _DEFINED_TYPE.findall(text) for name in pair if name}
    types = "|".join([_BUILT_IN_TYPE, *sorted(defined)])
    declared = re.compile(
        rf"(?P<before>(?:\b\w+\s+)*)\b(?:{types})\b(?:\s*<[^<>;(){{}}]*>)?"
        r"(?P<after>[\w\s]*)[*&](?!&)"
    )
    for match in declared.finditer(text):
        if not _ADDRESS_SPACE.search(match["before"] + match["after"]):
            yield (
                msl_text.line_of(text, match.start()),
                f"error: pointer or reference without an address space: {match[0].strip()}",
            )


def _misplaced_threadgroup_variables(text: str) -> Iterator[tuple[int, str]]:
    """They may stand only in the outermost scope of a kernel's body."""
    for match in msl_text.SHARED_VARIABLES.finditer(text):
        if _enclosing_braces(text, match.end()) != 1:
            yield (
                msl_text.line_of(text, match.end()),
                "error: threadgroup variable outside the outermost scope of a kernel's body",
            )


def _enclosing_braces(text: str, position: int) -> int:
    """How many braces of the kernel around ``position`` are open there; 0 outside kernels."""
    for kernel in re.finditer(r"\[\[kernel\]\]\s+void\s+\w+\s*(\()", text):
        body = text.index("{", msl_text.closing_bracket(text, kernel.start(1)))
        if body < position < msl_text.closing_bracket(text, body):
            return text.count("{", body, position) - text.count("}", body, position)
    return 0


def _forbidden_statements(text: str) -> Iterator[tuple[int, str]]:
    forbidden = {
        "lambda": r"\[[&=\w\s,]*\]\s*\([^()]*\)\s*(?:mutable\s*)?(?:->\s*\w+\s*)?\{",
        "goto": r"\bgoto\b",
    }
    for what, pattern in forbidden.items():
        for match in re.finditer(pattern, text):
            yield msl_text.line_of(text, match.start()), f"error: {what} is not part of Metal"
