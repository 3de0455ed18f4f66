"""What compiled kernels do with registers of products of warpgroups that are still running.

`wgmma.mma_async` (HGMMA) runs on while its warps do: until a wait that covers it nobody may write the registers of its
operand a, or touch its sums. The compiler knows nothing of that where the instruction is inline assembly, and puts
values where a product still reads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

REGISTER = re.compile(r"\bR(\d+)\b")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.F32 R(\d+), R(\d+), gdesc")
NO_TARGET = re.compile(r"ST|RED|SYNCS|ARRIVES|LDGSTS|UTMA|UBLK|BAR|BRA|EXIT|[FHID]SETP|R2UR|MEMBAR|FENCE|WARPGROUP")
OLD = 8  # groups back, past which registers count as just as old

# For each register in flight: the groups closed since it was used, 0 while its own is open, and whether it is a sum.
State = Mapping[int, tuple[int, bool]]


@dataclass
class Block:
    statements: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)  # labels


def find_nvdisasm() -> str | None:
    """Of a toolkit, or of the wheel nvidia-cuda-nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next(map(str, wheels), None)


def disassemble(nvdisasm: str, cubin: Path) -> str:
    return subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def count_products(sass: str) -> int:
    """How many there are that `touched_in_flight` knows as such."""
    return len(PRODUCT.findall(sass))


def touched_in_flight(sass: str) -> list[str]:
    """Statements that write a register of a product in flight, or read one of its sums.

    Args:
        sass: as `nvdisasm -c` writes it.
    """
    blocks = _blocks_of(sass)
    entries: dict[str, State] = {label: {} for label in blocks if label.startswith(".text.")}
    waiting = list(entries)
    while waiting:  # until what is in flight where blocks begin no longer changes
        label = waiting.pop()
        state = entries[label]
        for statement in blocks[label].statements:
            state = _after(statement, state)
        for following in blocks[label].next:
            merged = _merged(entries.get(following, {}), state)
            if following not in entries or merged != entries[following]:
                entries[following] = merged
                waiting.append(following)
    found = []
    for label, entry in entries.items():
        state = entry
        for statement in blocks[label].statements:
            written, read = _registers(statement)
            sums = {register for register, (_, is_sum) in state.items() if is_sum}
            if written & state.keys() or read & sums:
                found.append(statement)
            state = _after(statement, state)
    return found


def _after(statement: str, state: State) -> State:
    product = PRODUCT.search(statement)
    if product:
        columns, sums, operand = map(int, product.groups())
        used = dict.fromkeys(range(operand, operand + 4), (0, False))
        used |= dict.fromkeys(range(sums, sums + columns // 2), (0, True))
        state = {**state, **used}
    if "gsb0" in statement and not product:  # WARPGROUP.DEPBAR.LE gsb0, 0x1
        left = int(statement.rpartition(" ")[2], 16)
        return {register: (age, is_sum) for register, (age, is_sum) in state.items() if age <= left}
    if "gsb0" in statement:  # the group ends with this product
        return {register: (min(age + 1, OLD), is_sum) for register, (age, is_sum) in state.items()}
    return state


def _merged(one: State, other: State) -> State:
    merged = dict(one)
    for register, (age, is_sum) in other.items():
        known = merged.get(register, (OLD, False))
        merged[register] = min(age, known[0]), is_sum or known[1]
    return merged


def _registers(statement: str) -> tuple[Set[int], Set[int]]:
    """What it writes and what it reads; nothing of products themselves."""
    statement = re.sub(r"^@!?U?P\w+ ", "", statement)
    if PRODUCT.search(statement):
        return set(), set()
    opcode, _, operands = statement.partition(" ")
    if NO_TARGET.match(opcode):
        return set(), {int(number) for number in REGISTER.findall(operands)}
    target, _, others = re.sub(r"^(!?U?P[T\d], )+", "", operands).partition(",")
    size = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE|^CS2R$", opcode) else 1
    written = {int(number) + i for number in REGISTER.findall(target) for i in range(size)}
    return written, {int(number) for number in REGISTER.findall(others)}


def _blocks_of(sass: str) -> dict[str, Block]:
    """Basic blocks by their labels; a kernel's first one has the section's, .text.NAME."""
    blocks: dict[str, Block] = {}
    label = ""
    for line in sass.splitlines():
        named = re.match(r"(\.\w\S*|\$\S+):", line)
        if named:
            if label in blocks and not named[1].startswith(".text."):
                blocks[label].next.append(named[1])
            label = named[1]
            blocks[label] = Block()
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if not instruction:
            continue
        statement = instruction[1]
        blocks[label].statements.append(statement)
        if re.search(r"\b(BRA|EXIT|RET)\b", statement):
            target = re.search(r"`\((\S+?)\)", statement)
            if target:
                blocks[label].next.append(target[1])
            following = f"{label}+"
            if not re.fullmatch(r"EXIT|RET\S* .*|BRA `\(\S+\)", statement):
                blocks[label].next.append(following)
            label = following
            blocks[label] = Block()
    return blocks
