"""What a kernel's machine code says of its speed: instructions, issue load, bytes in flight.

Nothing is run. The path of a thread is read from the disassembly up to the atomic of the
last-program pattern, both sides of a branch counted. A backward branch makes a loop, which is taken
as often as the thread's elements need, going by what a turn loads; what a forward branch leaps over
within a loop is taken once, as the piece with a row's label is.

Issue load: the instructions of all threads at the speed of a copy, as a part of what the schedulers
can issue. Above 1 the kernel is bound by instructions, and near 1 it cannot reach the speed of
memory either.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# an H100 SXM: processors, lanes a cycle, clock, and what a copy reaches of its 3.35 TB/s
PROCESSORS, LANES, CLOCK, COPY = 132, 128, 1.755e9, 3.0e12
THREADS, REGISTERS, SHARED, BLOCKS = 2048, 65536, 233472, 32  # of one processor
# what `make kernels` lets pass; the latter in bytes of one processor
MOST_LOAD, LEAST_FLIGHT = 0.8, 30_000
WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Instruction:
    """One line of the disassembly."""

    address: int
    name: str  # LDG.E.EL.128
    operands: str
    guard: str = ""  # the predicate without which it does nothing

    @property
    def op(self) -> str:
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that a load or store moves for one thread."""
        return next((WIDTH[part] for part in self.name.split(".") if part in WIDTH), 4)


def read(text: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass` of one kernel."""
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
    )
    return [Instruction(int(m[1], 16), m[3], m[4], m[2] or "") for m in line.finditer(text)]


def path(code: list[Instruction]) -> list[Instruction]:
    """What every thread runs: up to a counter of arrivals, or to the end of the program."""
    ends = [i for i, one in enumerate(code) if one.op in ("ATOMG", "ATOM")]
    ends += [i for i, one in enumerate(code) if one.op == "BRA" and target(one) == one.address]
    return code[: min(ends) + 1] if ends else code


def target(one: Instruction) -> int:
    match = re.search(r"0x([0-9a-f]+)", one.operands)
    return int(match[1], 16) if match else one.address + 1


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of the loops."""
    for one in code:
        if one.op == "BRA" and target(one) < one.address:
            yield [other for other in code if target(one) <= other.address <= one.address]


def leapt(body: list[Instruction]) -> set[int]:
    """Addresses within a loop that a forward branch within it leaps over."""
    found = set()
    for one in body:
        if one.op == "BRA" and one.address < target(one) <= body[-1].address:
            found |= {other.address for other in body if one.address < other.address < target(one)}
    return found


def loaded(code: list[Instruction]) -> int:
    """Bytes of global memory that one thread loads."""
    return sum(one.bytes for one in code if one.op == "LDG")


def issue_load(instructions: float, moved: float) -> float:
    """Of code that takes so many instructions of a thread to move so many bytes."""
    return instructions / moved * COPY / (PROCESSORS * LANES * CLOCK)


def special_load(instructions: float, moved: float) -> float:
    """The same of MUFU (exponentials, roots, reciprocals), which an eighth of the lanes can do."""
    return 8.0 * issue_load(instructions, moved)


def resident(threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads that one processor holds at a time."""
    rounded = (registers + 7) // 8 * 8
    return min(
        THREADS // threads, REGISTERS // (rounded * threads), SHARED // (shared + 1024), BLOCKS
    )


def slow(load: float, flight: float) -> list[str]:
    """Why a kernel that streams cannot reach the speed of memory."""
    found = [f"issue load {load:.2f}, above {MOST_LOAD}"] if load > MOST_LOAD else []
    return found + (
        [f"{flight / 1000:.1f} KB in flight, below {LEAST_FLIGHT / 1000:.0f}"]
        * (flight < LEAST_FLIGHT)
    )


def speed(
    text: str,
    *,
    programs: int,
    threads: int,
    registers: int,
    shared: int,
    elements: int,
    itemsize: int,
    read_tensors: int,
    moved_tensors: int,
    cached_tensors: float = 0.0,
) -> dict[str, float]:
    """Of a kernel that streams over ``elements`` once, reading some tensors of all it moves;
    ``cached_tensors``: what it loads for each element beside them, again and again.
    """
    code = path(read(text))
    share = elements / (programs * threads)  # of a thread
    counts, flight = {one.address: 1 for one in code}, loaded(code)
    for body in loops(code):
        turn = loaded(body) / (itemsize * (read_tensors + cached_tensors))
        if turn >= 1:
            flight = loaded(body)
            rare = leapt(body)
            for one in body:
                counts[one.address] = 1 if one.address in rare else math.ceil(share / turn)
    special = sum(counts[one.address] for one in code if one.op == "MUFU")
    instructions = sum(counts.values()) / share
    blocks = resident(threads, registers, shared)
    return {
        "instructions_per_element": round(instructions, 2),
        "mufu_per_element": round(special / share, 2),
        "issue_load": round(issue_load(instructions, itemsize * moved_tensors), 3),
        "mufu_load": round(special_load(special / share, itemsize * moved_tensors), 3),
        "blocks": blocks,
        "bytes_in_flight": round(
            blocks * threads * flight * read_tensors / (read_tensors + cached_tensors)
        ),
    }
