"""What the machine code of a kernel does: instructions of its hot loop, counted in a cubin."""

import functools
import heapq
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

# A line of nvdisasm: the address, a predicate where there is one, and the instruction.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\d+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L\w*):")
_TARGET = re.compile(r"`\((\.L\w*)\)")


@functools.cache
def disassembler() -> Path | None:
    """nvdisasm, which the package ``nvidia-cuda-nvdisasm`` brings, or None."""
    try:
        listed = files("nvidia-cuda-nvdisasm") or []
    except PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in listed if file.name == "nvdisasm"), None)


class Block(NamedTuple):
    """Instructions in a row that all run if the first does.

    Attributes:
        names: Of the instructions.
        next: Numbers of the blocks that may follow.
    """

    names: tuple[str, ...]
    next: tuple[int, ...]

    def count(self, name: str) -> int:
        """Instructions whose name begins so."""
        return sum(n.startswith(name) for n in self.names)


def kernel_blocks(cubin: Path, name: str) -> list[Block]:
    """The blocks of the kernel of a cubin whose mangled name holds ``name``, in order."""
    command = [str(disassembler()), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]
    (section,) = (s for s in sections if name in s.partition(":")[0])
    return _blocks(section)


def _blocks(section: str) -> list[Block]:
    names: list[list[str]] = [[]]
    jumps: list[list[str]] = [[]]
    falls: list[bool] = [True]
    first_of: dict[str, int] = {}

    def begin_block() -> None:
        if names[-1]:
            names.append([])
            jumps.append([])
            falls.append(True)

    for line in section.splitlines():
        if label := _LABEL.match(line):
            begin_block()
            first_of[label[1]] = len(names) - 1
        elif found := _INSTRUCTION.search(line):
            predicate, instruction, operands = found.groups()
            names[-1].append(instruction)
            if instruction.startswith(("BRA", "EXIT")):
                jumps[-1] += _TARGET.findall(operands)
                # A branch that asks something else than its predicate names that first.
                asks = instruction.startswith("BRA.DIV") or "P" in operands.partition("`")[0]
                falls[-1] = bool(predicate) or asks
                begin_block()
    return [
        Block(tuple(n), (*(first_of[j] for j in jump), *([i + 1] if fall else [])))
        for i, (n, jump, fall) in enumerate(zip(names, jumps, falls, strict=True))
        if n or i + 1 < len(names)
    ]


def hot_loop(blocks: list[Block]) -> tuple[str, ...]:
    """Instructions of one turn of the loop with the most matrix products.

    Of the ways through it, this is the shortest of those with the most asynchronous copies: so
    copies are under way, and what only some turns need (masks, the product with centres) is left
    out.
    """
    loops = [loop for loop in _loops(blocks) if any(blocks[b].count("HMMA") for b in loop)]
    loop = max(loops, key=lambda loop: sum(blocks[b].count("HMMA") for b in loop))
    head = min(
        b for b in loop if any(b in block.next for i, block in enumerate(blocks) if i not in loop)
    )
    under_way: set[int] = set()

    @functools.cache
    def rest(at: int) -> tuple[int, int, tuple[str, ...]] | None:
        """Copies, minus instructions, and instructions from a block to the end of the turn."""
        under_way.add(at)
        ways = [
            (0, 0, ()) if b == head else rest(b)
            for b in blocks[at].next
            if b in loop and (b == head or b not in under_way)
        ]
        under_way.discard(at)
        found = [way for way in ways if way is not None]
        if not found:
            return None
        copies, length, names = max(found, key=lambda way: way[:2])
        here = blocks[at]
        return copies + here.count("LDGSTS"), length - len(here.names), here.names + names

    way = rest(head)
    assert way is not None, "the loop has no way back"
    return way[2]


def way_through(
    blocks: list[Block], must: Callable[[Block], bool], may: Callable[[Block], bool]
) -> tuple[str, ...]:
    """Instructions from the first block to the end, by the shortest way that is asked for.

    It goes through every block that it must, and only through those that it may. No loop is gone
    through twice, and only a loop of which it must have a part is gone through at all.
    """
    bits = {b: 1 << i for i, b in enumerate(b for b, block in enumerate(blocks) if must(block))}
    whole = (1 << len(bits)) - 1
    start = (0, bits.get(0, 0))
    before: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    waiting = [(len(blocks[0].names), start)]
    settled: set[tuple[int, int]] = set()
    cost = {start: len(blocks[0].names)}
    while waiting:
        length, place = heapq.heappop(waiting)
        if place in settled:
            continue
        settled.add(place)
        at, met = place
        if met == whole and "EXIT" in blocks[at].names and not blocks[at].next:
            way = []
            step: tuple[int, int] | None = place
            while step is not None:
                way.append(step[0])
                step = before[step]
            return tuple(n for b in reversed(way) for n in blocks[b].names)
        for b in blocks[at].next:
            if b >= len(blocks) or not may(blocks[b]):
                continue
            following = (b, met | bits.get(b, 0))
            new = length + len(blocks[b].names)
            if new < cost.get(following, new + 1):
                cost[following], before[following] = new, place
                heapq.heappush(waiting, (new, following))
    raise AssertionError("no way goes through all these blocks")


def loops_of(blocks: list[Block]) -> list[tuple[str, ...]]:
    """All instructions of each loop that holds no other, in order."""
    return [tuple(n for b in sorted(loop) for n in blocks[b].names) for loop in _loops(blocks)]


def _loops(blocks: list[Block]) -> list[set[int]]:
    """Strongly connected blocks."""

    def reached(start: int, edges: list[tuple[int, ...]]) -> set[int]:
        seen, waiting = set(), [start]
        while waiting:
            for b in edges[waiting.pop()]:
                if b not in seen and b < len(blocks):
                    seen.add(b)
                    waiting.append(b)
        return seen

    forward = [block.next for block in blocks]
    backward: list[tuple[int, ...]] = [() for _ in blocks]
    for i, block in enumerate(blocks):
        for b in block.next:
            if b < len(blocks):
                backward[b] += (i,)
    loops, left = [], set(range(len(blocks)))
    while left:
        b = left.pop()
        loop = reached(b, forward) & reached(b, backward)
        if b in loop:
            loops.append(loop)
            left -= loop
    return loops
