"""Reads a compiled program: its kernels, what each reads and writes, and which part of the network it belongs to.

XLA's text of a program is read because there is nothing else: GPU compilers without a GPU give no cost analysis.
"""

import collections
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PARTS = re.compile(r"(?:convolution \d|norm, |sparse attention, |attention, |optimiser)[^/()]*")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_KIND = re.compile(r" ([a-z][\w-]*)\(")
_NAMED, _OPERAND = re.compile(r'op_name="([^"]*)"'), re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")  # the type's bits are its first number
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ORDER = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_OF_A_MAP = re.compile(r", (?:\d+ to )?\d+ channels, \d+ px")
_COLLECTIVES = "all-", "reduce-scatter", "collective-"
_BACKWARD = "transpose("  # what JAX calls the scopes of gradients
# Names for what another operation writes or holds: no kernels.
_NO_KERNELS = {"parameter", "get-tuple-element", "bitcast", "constant", "tuple", "after-all", "partition-id"}
_TURNS = {"transpose", "copy"}


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    kind: str  # the operation, or what a custom call calls
    shape: str  # of its result, as XLA writes it
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations
    trips: int  # of a loop
    order: tuple[str, str, str] | None  # of a convolution's axes: "b01f" is NHWC


class Kernel(NamedTuple):
    """What a device does at a time."""

    name: str
    kind: str
    part: str  # of the network
    bytes: int  # of its operands and results: a little too much where it reads slices of them
    times: int  # how often it runs


class Convolutions(NamedTuple):
    """What becomes of the convolutions, each counted once."""

    count: int
    channels_last: int  # whose feature maps are NHWC
    narrow: int  # that read feature maps in bfloat16 or float16
    turned: int  # feature maps that a kernel before or after transposes or copies


def origins(program: str) -> dict[str, str]:
    """Where each operation of a compiled program comes from, scopes and all; XLA forgets it where it rewrites products.

    What is forgotten is taken from the first operand that has an origin: operands stand before what uses them.
    """
    found: dict[str, str] = {}
    for name, rest in filter(None, map(_parsed, program.splitlines())):
        if named := _NAMED.search(rest):
            found[name] = named[1]
        else:
            found[name] = next((found[operand] for operand in _OPERAND.findall(rest) if found.get(operand)), "")
    return found


def part(operation: str, origin: str) -> str:
    """Which part of the network an operation belongs to; what belongs to none is called by its own kind."""
    if operation.startswith(_COLLECTIVES):  # their time is mostly that of waiting for the slowest device
        return f"devices meet: {re.sub(r'[.][0-9.]+$', '', operation)}"
    found = _PARTS.findall(origin)
    if not found:
        kind = origin.rpartition("/")[2] or re.sub(r"[.\d]+$", "", operation)
        return f"other: {kind}"
    return f"{found[-1]}, gradients" if _BACKWARD in origin else found[-1]


def kernels(program: str) -> list[Kernel]:
    """The kernels that a compiled program launches, those of loops once, with how often they run."""
    computations, entry = _computations(program)
    return list(_launched(computations, entry, origins(program), 1))


def convolutions(program: str) -> Convolutions:
    """What became of the convolutions of a program that was compiled for a GPU."""
    computations, _ = _computations(program)
    found = [_convolution(instruction, lines, computations) for lines in computations.values()
             for instruction in lines.values() if instruction.order]
    return Convolutions(len(found), *(sum(of_each[i] for of_each in found) for i in range(3)))


def traffic(kernels: Iterable[Kernel]) -> int:
    """Bytes that they read and write."""
    return sum(kernel.bytes * kernel.times for kernel in kernels)


def traffic_by_part(kernels: Iterable[Kernel]) -> list[tuple[str, int]]:
    """The parts of the network with their bytes, the most first; norms and convolutions of all sizes together."""
    total = collections.Counter()
    for kernel in kernels:
        total[_OF_A_MAP.sub("", kernel.part)] += kernel.bytes * kernel.times
    return total.most_common()


def _parsed(line: str) -> tuple[str, str] | None:
    found = _INSTRUCTION.match(line)
    return found and (found[1], found[2])


def _computations(program: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The instructions of each computation, and which one is the program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, lines = "", {}
    for line in program.splitlines():
        if header := _HEADER.match(line):
            lines = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (parsed := _parsed(line)) and (instruction := _instruction(*parsed)):
            lines[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction | None:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind = _KIND.match(rest, shape_end)
    if kind is None:
        return None
    end = _closing(rest, kind.end() - 1)
    attributes = rest[end:]
    target, trips, order = (pattern.search(attributes) for pattern in (_TARGET, _TRIPS, _ORDER))
    return Instruction(
        name, target[1] if target else kind[1], rest[:shape_end], tuple(_OPERAND.findall(rest[kind.end():end])),
        tuple(_CALLED.findall(attributes)), int(trips[1]) if trips else 1, order.groups() if order else None)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _launched(computations, name, origin, times) -> Iterator[Kernel]:
    lines = computations[name]
    for instruction in lines.values():
        if instruction.kind in _NO_KERNELS or instruction.kind.endswith(("-done", "-update")):
            continue
        if instruction.kind in ("while", "call", "async-start"):
            for called in instruction.called:
                yield from _launched(computations, called, origin, times * instruction.trips)
            continue
        shapes = [instruction.shape, *(lines[operand].shape for operand in instruction.operands if operand in lines)]
        yield Kernel(instruction.name, instruction.kind, part(instruction.name, origin.get(instruction.name, "")),
                     sum(map(_bytes, shapes)), times)


def _bytes(shape: str) -> int:
    """Of all arrays in a shape."""
    total = 0
    for kind, bits, sizes in _ARRAY.findall(shape):
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size)
        total += elements * (int(bits) if bits else 8 * (kind == "pred")) // 8
    return total


def _convolution(instruction, lines, computations) -> tuple[bool, bool, int]:
    """Channels last? Narrow? How many of its feature maps are turned?"""
    # cuDNN reads map and kernel, perhaps bias and a map that is added; for the kernel's gradient, two maps.
    gives_weights, operands = "Filter" in instruction.kind, instruction.operands
    maps = operands[:2] if gives_weights else (*operands[:1], *operands[3:])
    turned = sum(_turns(_source(name, lines), computations) for name in maps)
    if not gives_weights:
        turned += any(_turns(user, computations) for user in _users(instruction.name, lines))
    orders = (instruction.order[0], instruction.order[2])  # cuDNN's three kinds name the maps first and last
    narrow = all(re.match(r"\(?(bf16|f16)", lines[name].shape) for name in maps if name in lines)
    return all(order.endswith("f") for order in orders), narrow, turned


def _source(name: str, lines: dict[str, Instruction]) -> Instruction | None:
    """What computes an array, behind mere names for it."""
    instruction = lines.get(name)
    while instruction and instruction.kind in ("bitcast", "get-tuple-element") and instruction.operands:
        instruction = lines.get(instruction.operands[0])
    return instruction


def _users(name: str, lines: dict[str, Instruction]) -> Iterator[Instruction]:
    for instruction in lines.values():
        if name in instruction.operands:
            if instruction.kind in ("bitcast", "get-tuple-element"):
                yield from _users(instruction.name, lines)
            else:
                yield instruction


def _turns(instruction: Instruction | None, computations) -> bool:
    """Whether it does nothing but to transpose or copy, or transposes on the way of doing something else."""
    if instruction is None:
        return False
    if instruction.kind in _TURNS:
        return True
    inner = [i for called in instruction.called for i in computations.get(called, {}).values()]
    kinds = {i.kind for i in inner} - _NO_KERNELS
    return instruction.kind == "fusion" and bool(kinds) and (kinds <= _TURNS or "transpose" in kinds)
