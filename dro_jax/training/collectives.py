"""What the devices send to each other in a step, read from the compiled program's text (HLO)."""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"  (?:ROOT )?%?[\w.\-]+ = (.*?) "
    rf"(while|fusion|call|conditional|async-start|(?:{'|'.join(KINDS)})(?:-start)?)\("
)
_CALLED = re.compile(
    r"(condition|body|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_SHAPE = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
      kind: one of `KINDS`.
      runs: how often they run.
      sent: bytes that each device sends, where they go round rings.
    """

    kind: str
    runs: int
    sent: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    name: str
    line: str


def read_collectives(hlo: str) -> list[Collective]:
    """Adds up a compiled program's collectives, those in loops as often as the loops turn.

    In a ring of n devices each sends (n - 1)/n of an all-gather's or all-to-all's result, twice that of an
    all-reduce's, n - 1 times a reduce-scatter's, and all of a permute's. The pieces that a TPU program cuts a
    collective into, to run them beside its arithmetic, count as the one that they are.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.

    Returns:
      The kinds that occur, those that send most first. A loop whose length the text does not say counts once.
    """
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else 1
    computations, entry = _parse(hlo)
    counts: collections.Counter[str] = collections.Counter()
    sent: dict[str, float] = collections.defaultdict(float)
    pieces: dict[str, tuple[int, str, float]] = {}

    def walk(name: str, times: int, fused: bool) -> None:
        for instruction in map(_instruction, computations[name]):
            if instruction is None:
                continue
            called = {
                role: re.findall(r"[\w.\-]+", one or several)
                for role, one, several in _CALLED.findall(instruction.line)
            }
            kind = instruction.name.removesuffix("-start")
            if kind in KINDS:
                volume = _sent(instruction, devices)
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                if fused and channel:
                    # Pieces may lie in loops beside the others, which they outlast: the outermost says how often.
                    found = (times, kind, volume)
                    pieces[channel[1]] = min(found, pieces.get(channel[1], found))
                else:
                    counts[kind] += times
                    sent[kind] += times * volume
            elif instruction.name == "while":
                (condition,), (body,) = called["condition"], called["body"]
                turns = _turns(instruction.line, computations, condition, body)
                walk(body, times * turns, fused)
            else:
                for names in called.values():
                    for one in names:
                        walk(one, times, fused or instruction.name == "fusion")

    walk(entry, 1, False)
    for times, kind, volume in pieces.values():
        counts[kind] += times
        sent[kind] += times * volume
    return sorted(
        (Collective(kind, counts[kind], volume) for kind, volume in sent.items()),
        key=lambda collective: -collective.sent,
    )


def _parse(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that runs."""
    computations: dict[str, list[str]] = {}
    entry, inside = "", list[str]()
    for line in hlo.splitlines():
        if line.startswith("  "):
            inside.append(line)
        elif found := _COMPUTATION.match(line):
            inside = computations[found[2]] = []
            entry = found[2] if found[1] else entry
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    found = _INSTRUCTION.match(line)
    return found and _Instruction(found[1], found[2], line)


def _turns(loop: str, computations: dict[str, list[str]], condition: str, body: str) -> int:
    """How often a loop turns: as it says, or by what its counter, which begins at 0, is compared with and grows.

    Where it is compared with what only a run can tell as well, at most so often.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    text = "\n".join(computations[condition])
    fused = re.findall(r"calls=%?([\w.\-]+)", text)
    compared = [line for name in (condition, *fused) for line in computations[name]]
    limit = max(_constants(compared).values(), default=1)
    read = re.findall(r"get-tuple-element\(.*\), index=(\d+)", text)
    step = max((_step(computations[body], int(index)) for index in read), default=1)
    return math.ceil(limit / step)


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to an element of the tuple that it goes round with; 1 where it does not say."""
    constants = _constants(body)
    result = next((line for line in body if " tuple(" in line and "ROOT" in line), "")
    elements = re.findall(
        r"[\w.\-]+(?=[,)])", re.sub(r"/\*.*?\*/", "", result.partition(" tuple(")[2])
    )
    for line in body:
        found = re.match(r"  %?([\w.\-]+) = \S+ add\((.*?)\)", line)
        if found and elements[counter : counter + 1] == [found[1]]:
            return max(constants.get(name, 1) for name in re.findall(r"[\w.\-]+", found[2]))
    return 1


def _constants(lines: list[str]) -> dict[str, int]:
    """The whole numbers of a computation by their names."""
    found = (re.match(r"  %?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _sent(instruction: _Instruction, devices: int) -> float:
    """Bytes that each device of the groups sends for one run of a collective."""
    ring = _group_size(instruction.line, devices)
    kind = instruction.name.removesuffix("-start")
    parts = _top_level(instruction.type)
    if instruction.name in ("all-gather-start", "collective-permute-start"):
        # What goes in, what comes out, and on TPU what they are synchronised by.
        parts = parts[1:2]
    result = sum(_bytes(part) for part in parts)
    share = {
        "all-reduce": 2 * (ring - 1) / ring,
        "reduce-scatter": ring - 1,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    return result * share.get(kind, (ring - 1) / ring)


def _group_size(line: str, devices: int) -> int:
    """Devices that a collective brings together; HLO writes its groups in four ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(tiled[1])
    if named := re.search(r"replica_groups=\S*mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # Of an axis cut in two, 'axis':(4)2 is 2 devices.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _top_level(type_: str) -> list[str]:
    """The elements of a tuple type, one element of any other."""
    if not type_.startswith("("):
        return [type_]
    parts, depth = [""], 0
    for character in type_[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _bytes(type_: str) -> int:
    """Size of the arrays of a type, without padding."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * max(int(bits or 8) // 8, 1)
        for _, bits, sizes in _SHAPE.findall(type_)
    )
