"""What a compiled program costs, read off its text: `compiled.as_text()`.

`cycles`, the TPU compiler's own estimate, is what `python -m jaxce` reports too. A GPU's compiler estimates no time.
`kernels`, `traffic`, `loop_traffic` and `matmuls` count what its program launches, reads, writes and multiplies.
`collectives` lists what a program's devices send each other.

Everywhere a loop's body counts as often as it runs, and a conditional as its cheapest branch.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxce._report.hlo import (
    Computation,
    Instruction,
    Program,
    Shape,
    carried,
    cycles,
    instruction,
    known,
    parse,
    total,
    trips,
)

__all__ = ["Computation", "Instruction", "Shape", "cycles", "instruction", "parse"]

# Operations that run nothing.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency")
SLICES = ("slice", "dynamic-slice", "gather")
# Inside a fusion: an entry is made from the entry it is of, so that a slice of the result needs no more than a slice.
VIEWS = ("bitcast", "convert", "copy", "reshape", "transpose")


def kernels(text: str) -> int:
    """How many kernels, copies among them, a run of a GPU's program launches."""
    return total(parse(text), lambda _, i: int(launches(i)))


def launches(i: Instruction) -> bool:
    """Whether it is one; what runs beside others is launched by its start."""
    if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
        return False
    return 'custom_call_target="AllocateBuffer"' not in i.attributes


class Collective(NamedTuple):
    """What devices send each other, `times` in a run."""

    kind: str
    shape: Shape  # the larger of what it takes and what it makes
    devices: int  # of a group
    times: int
    inside: tuple[str, ...]  # the loops ("while") and branches ("conditional") that it is in, outermost first

    @property
    def bytes(self) -> int:
        """What each device sends in a run, where each group is a ring."""
        share = 1.0 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        return round(self.times * self.shape.bytes * share * (2 if self.kind == "all-reduce" else 1))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> list[Collective]:
    """All of a program's, those of every branch too."""
    program = parse(text)
    return list(collectives_of(program, program.entry, (), 1, ()))


def collectives_of(
    program: Program, name: str, arguments: Sequence[Any], times: int, inside: tuple[str, ...]
) -> Iterator[Collective]:
    computation = program.computations[name]
    for i in computation.instructions.values():
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            arrays = [shape for operand in i.operands for shape in computation.shapes(operand)]
            # What starts one returns the arrays that it takes before those that it makes.
            results = i.shapes[len(arrays) :] if i.opcode.endswith("-start") and len(i.shapes) > 1 else i.shapes
            if "all-reduce-scatter" in name:  # a fusion of a TPU's compiler
                kind = "reduce-scatter"
            for taken, made in zip(arrays, results or arrays, strict=False):
                larger = max(taken, made, key=lambda shape: shape.bytes)
                if group_size(i) > 1:
                    yield Collective(kind, larger, group_size(i), times, inside)
        given = [known(computation, operand, arguments) for operand in i.operands]
        if i.opcode == "while":
            turns, passed = trips(program, i, given[0]), [carried(program, i, given[0])]
            yield from collectives_of(program, i.called("body"), passed, times * turns, (*inside, i.opcode))
        elif i.opcode == "conditional":
            for branch, argument in zip(i.branches(), given[1:], strict=True):
                yield from collectives_of(program, branch, [argument], times, (*inside, i.opcode))
        elif i.opcode in ("fusion", "call", "async-start"):
            called = i.called("calls") or i.called("to_apply")
            yield from collectives_of(program, called, given, times, inside)


def group_size(i: Instruction) -> int:
    """How many devices take part together in a collective."""
    if i.opcode.startswith("collective-permute"):
        return 2
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", i.attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", i.attributes)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes)
    if not listed:
        raise ValueError(f"the devices of {i.name} are not to be found: {i.attributes[:200]}")
    return len(listed.group(1).split(","))


class Traffic(NamedTuple):
    """How often `times`, and each time: bytes read and written, arrays of as many entries as the logits."""

    times: int
    read: int
    written: int
    logits_read: int
    logits_written: int


def traffic(text: str, entries: int) -> Traffic:
    """Of a whole program, each kernel reading its operands once; the logits have so many entries, of any dtype."""
    return traffic_of(parse(text), "", (), 1, entries)


def loop_traffic(text: str, entries: int) -> list[Traffic]:
    """Of each loop of the entry that has a matmul in it, for once through its body."""
    program = parse(text)
    return [traffic_of(program, body, arguments, times, entries) for body, arguments, times in matmul_loops(program)]


def matmul_loops(program: Program) -> Iterator[tuple[str, list[Any], int]]:
    """The entry's loops with matmuls: their bodies, what is known of the bodies' arguments, and how often they run."""
    entry = program.computations[program.entry]
    for i in entry.instructions.values():
        if i.opcode == "while" and any(matmuls_in(program, i.called("body"))):
            start = known(entry, i.operands[0], ())
            yield i.called("body"), [carried(program, i, start)], trips(program, i, start)


def traffic_of(program: Program, name: str, arguments: Sequence[Any], times: int, entries: int) -> Traffic:
    def reads(computation: Computation, i: Instruction) -> list[Shape]:
        if not launches(i):
            return []
        operands = dict.fromkeys(i.operands)
        return [shape for operand in operands for shape in read_by(program, computation, i, operand)]

    def writes(computation: Computation, i: Instruction) -> list[Shape]:
        return written_by(program, computation, i) if launches(i) else []

    def summed(shapes: Callable[..., list[Shape]], size: Callable[[Shape], int]) -> int:
        return total(program, lambda *where: sum(size(shape) for shape in shapes(*where)), name, arguments)

    return Traffic(
        times,
        read=summed(reads, lambda shape: shape.bytes),
        written=summed(writes, lambda shape: shape.bytes),
        logits_read=summed(reads, lambda shape: shape.entries == entries),
        logits_written=summed(writes, lambda shape: shape.entries == entries),
    )


def read_by(program: Program, computation: Computation, user: Instruction, name: str) -> list[Shape]:
    """The arrays or parts of arrays that an instruction reads of its operand `name`."""
    first = user.operands[0] == name
    if user.opcode in SLICES and first:
        return list(user.shapes[:1])
    if user.opcode == "dynamic-update-slice" and first:
        return []
    called = program.computations.get(user.called("calls"))
    if called is None:
        return list(computation.shapes(name))
    places = [k for k, operand in enumerate(user.operands) if operand == name]
    return [shape for k in places for shape in read_inside(program, called, called.parameter(k).name)]


def read_inside(program: Program, fused: Computation, name: str) -> list[Shape]:
    """The arrays or parts of arrays that a fusion reads of its parameter `name`, or of a view of it."""
    whole = list(fused.shapes(name))
    if name == fused.root.name:
        return whole
    found = []
    for user in fused.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in VIEWS:
            of_view = read_inside(program, fused, user.name)
            parts = [shape._replace(dtype=whole[0].dtype) for shape in of_view]
        elif user.opcode == "dynamic-update-slice" and not in_place(fused, user):
            return whole
        else:
            parts = read_by(program, fused, user, name)
        if sum(shape.entries for shape in parts) >= whole[0].entries:
            return whole
        found += parts
    return found


def in_place(fused: Computation, update: Instruction) -> bool:
    """Whether a fusion writes an update into its operand: whether what it returns is the updated array, or a view."""
    returned = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    return any(returned_by(fused, name).name == update.name for name in returned)


def returned_by(fused: Computation, name: str) -> Instruction:
    i = fused.instructions[name]
    return returned_by(fused, i.operands[0]) if i.opcode == "bitcast" else i


def written_by(program: Program, computation: Computation, i: Instruction) -> list[Shape]:
    """The arrays or parts of arrays that an instruction writes."""
    called = program.computations.get(i.called("calls"))
    if called is not None:
        returned = called.root.operands if called.root.opcode == "tuple" else (called.root.name,)
        sources = [returned_by(called, name) for name in returned]
        return [shape for source in sources for shape in written_by(program, called, source)]
    if i.opcode == "dynamic-update-slice":
        return list(computation.shapes(i.operands[1]))
    # Behind the array itself, a copy that runs beside others has its source, and a matmul of cuBLAS its workspace.
    only_first = i.opcode == "copy-start" or "__cublas" in i.attributes
    return list(i.shapes[:1] if only_first else i.shapes)


class Matmul(NamedTuple):
    """`batch` times (m, k) by (k, n)."""

    batch: int
    m: int
    k: int
    n: int
    left: str  # dtypes
    right: str
    out: str

    def __str__(self) -> str:
        batch = f"{self.batch}·" if self.batch > 1 else ""
        dtypes = self.left if self.left == self.right else f"{self.left}·{self.right}"
        return f"{batch}{self.m}×{self.k}×{self.n} {dtypes}→{self.out}"


def matmuls(text: str) -> list[list[Matmul]]:
    """The matmuls in each loop of a GPU's program, once through its body, less those that a conditional may do."""
    program = parse(text)
    return [list(matmuls_in(program, body)) for body, *_ in matmul_loops(program)]


def matmuls_in(program: Program, name: str) -> Iterator[Matmul]:
    computation = program.computations[name]
    for i in computation.instructions.values():
        if i.opcode == "dot" or "__cublas" in i.attributes:
            yield matmul(computation, i)
        for attribute in ("calls", "body", "to_apply"):
            called = i.called(attribute)
            if called:
                yield from matmuls_in(program, called)


def matmul(computation: Computation, i: Instruction) -> Matmul:
    (left,), (right,) = (computation.shapes(operand) for operand in i.operands[:2])
    contracted, batch = axes(i, "lhs_contracting"), axes(i, "lhs_batch")
    taken = {*axes(i, "rhs_contracting"), *axes(i, "rhs_batch")}
    return Matmul(
        batch=math.prod(left.dims[axis] for axis in batch),
        m=math.prod(d for axis, d in enumerate(left.dims) if axis not in (*contracted, *batch)),
        k=math.prod(left.dims[axis] for axis in contracted),
        n=math.prod(d for axis, d in enumerate(right.dims) if axis not in taken),
        left=left.dtype,
        right=right.dtype,
        out=i.shapes[0].dtype,
    )


def axes(i: Instruction, which: str) -> list[int]:
    """Axes of a dot, `lhs_batch_dims={0}`, or of a call of cuBLAS, `"lhs_batch_dimensions":["0"]`."""
    found = re.search(rf'{which}_dim\w+"?[=:][{{\[]([\d,"]*)', i.attributes)
    return [int(axis) for axis in re.findall(r"\d+", found.group(1))] if found else []
