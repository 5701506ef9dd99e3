"""What a program costs, read from what JAX traced and from what XLA compiled.

XLA's own `cost_analysis` counts the body of a loop once. Here everything counts as often as it
runs: loops by their trip counts, conditionals as their dearest branch.
"""

import collections
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT")
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
# These move nothing by themselves.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
_FREE += ("call", "iota", "after-all", "partition-id", "replica-id", "opt-barrier", "custom-call")


def product_flops(jaxpr: Any, unknown_trip_count: int = 1, *, once: bool = False) -> float:
    """Return the operations of all matrix products of a traced program, over all devices.

    What Pallas kernels multiply is not counted.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      unknown_trip_count: how often a loop runs whose count is data.
      once: count the body of every loop once, as XLA's `cost_analysis` does.
    """
    count = functools.partial(product_flops, unknown_trip_count=unknown_trip_count, once=once)
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(left[i] for i in contracted) * eqn.outvars[0].aval.size
        elif name == "scan":
            total += (1 if once else params["length"]) * count(params["jaxpr"])
        elif name == "while":
            total += (1 if once else unknown_trip_count) * count(params["body_jaxpr"])
        elif name == "cond":
            total += max(map(count, params["branches"]))
        elif name == "shard_map":  # its body is that of one part
            parts = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += parts * count(params["jaxpr"])
        elif name != "pallas_call":
            inner = (x for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns"))
            total += sum(map(count, inner))
    return total


def executed(hlo_text: str, unknown_trip_count: int = 1) -> list[tuple[str, int]]:
    """Return the instructions of a compiled program, each with how often it runs.

    What is in a fusion is not looked at.

    Args:
      unknown_trip_count: how often a loop runs whose count is data.

    Raises:
      ValueError: there is no program in the text.
    """
    bodies = _computations(hlo_text)
    if "" not in bodies:
        raise ValueError("no ENTRY computation in the text: expected an XLA program")

    def trip_count(line: str, condition: str) -> int:
        if found := _TRIPS.search(line):
            return int(found[1])
        # TPU programs do not say it, but a counted loop compares its counter with a constant.
        text = "\n".join(bodies[condition])
        limit = _LIMIT.search(text)
        value = limit and re.search(rf"{re.escape(limit[1])} = [su]32\S+ constant\((\d+)\)", text)
        return int(value[1]) if value else unknown_trip_count

    def cost(instructions: Iterable[tuple[str, int]]) -> tuple[int, int]:
        instructions = list(instructions)
        return sum(cycles_of(line) * count for line, count in instructions), len(instructions)

    @functools.cache
    def run(name: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for line in bodies[name]:
            found.append((line, 1))
            if loop := _WHILE.search(line):
                count = trip_count(line, loop[1])
                found += [(x, count * n) for part in loop.groups() for x, n in run(part)]
            elif branches := _BRANCHES.search(line):
                found += max((run(x.strip(" %")) for x in branches[1].split(",")), key=cost)
            elif called := _CALL.search(line):
                found += run(called[1])
        return found

    return run("")


def _computations(hlo_text: str) -> dict[str, list[str]]:
    """Return the lines of every computation by its name; those of the entry also by ''."""
    bodies: dict[str, list[str]] = {}
    for line in hlo_text.splitlines():
        if found := _COMPUTATION.match(line):
            bodies[found[2]] = lines = []
            if found[1]:
                bodies[""] = lines
        elif line.startswith("  ") and bodies:
            lines.append(line)
    return bodies


def cycles_of(line: str) -> int:
    """Return the clock cycles that XLA expects of an instruction, 0 where it says nothing."""
    found = _CYCLES.search(line)
    return int(found[1]) if found else 0


def collective_bytes(hlo_text: str, unknown_trip_count: int = 1) -> collections.Counter:
    """Return what each kind of collective gives to a device, in bytes."""
    total: collections.Counter = collections.Counter()
    for line, count in executed(hlo_text, unknown_trip_count):
        found = _INSTRUCTION.match(line)
        if found and (kind := found[3].removesuffix("-start")) in _COLLECTIVES:
            sizes = _sizes(found[2], everywhere=True)
            # A started gather or permutation returns its operand too.
            both = found[3] in ("all-gather-start", "collective-permute-start")
            total[kind] += count * (max(sizes) if both else sum(sizes))
    return total


def moved_bytes(hlo_text: str, unknown_trip_count: int = 1) -> int:
    """Return about how many bytes a device reads from its main memory and writes to it.

    Each instruction reads its operands and writes its result, unless they are in fast memory,
    which TPU programs mark S(1). Of an operand that a fusion takes slices or rows of, it reads no
    more than it returns; what it updates in place it does not move.
    """
    bodies = _computations(hlo_text)
    sizes: dict[str, int] = {}
    for lines in bodies.values():
        for line in lines:
            if found := _INSTRUCTION.match(line):
                sizes[found[1]] = sum(_sizes(found[2]))
    total = 0
    for line, count in executed(hlo_text, unknown_trip_count):
        found = _INSTRUCTION.match(line)
        if not found or found[3] in _FREE or found[3].endswith("-done"):
            continue
        name, shapes, kind, rest = found.groups()
        if kind.endswith("-start"):
            # A copy that runs beside other work: of operand and result, the smaller is moved.
            arrays = [size for size in _sizes(shapes, everywhere=True) if size > 4]
            if kind.removesuffix("-start") not in _COLLECTIVES:
                total += count * min(arrays, default=0)
            continue
        operands = [sizes.get(x, 0) for x in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        body = " ".join(bodies.get(called[1], ())) if called else kind + "("
        result = sizes[name]
        if "dynamic-update-slice(" in body or "scatter(" in body:
            total += 2 * count * sum(size for size in operands if size < result)
        elif "dynamic-slice(" in body or " gather(" in body or kind == "gather":
            total += count * (result + sum(min(size, result) for size in operands))
        else:
            total += count * (result + sum(operands))
    return total


_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}


def _sizes(shapes: str, everywhere: bool = False) -> list[int]:
    """Return the bytes of every array in a shape's text; 0 for one in fast memory, if not asked."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(shapes):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
        number = math.prod(int(size) for size in dims.split(",") if size)
        hidden = "S(1)" in layout and not everywhere
        found.append(0 if hidden else number * bits // 8)
    return found or [0]
