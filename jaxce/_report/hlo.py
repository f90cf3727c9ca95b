"""The program that a compiler made, read off its text (`compiled.as_text()`), and what a TPU's compiler expects of it.

`cycles` is the TPU compiler's own estimate, which it writes beside each instruction and schedules by. It is a model, no
measurement: collectives and Pallas kernels count as nothing, matmuls come out at about 97% of the chip's peak, and
passes of the vector unit are overrated. Compare programs of the same matmuls by it, and believe differences above a
tenth.

A loop's body counts as often as it runs, and a conditional as its cheapest branch.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

NAME = r"%[\w.\-]+"


class Shape(NamedTuple):
    """Of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def entries(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.entries * (int(bits.group()) if bits else 8 * (self.dtype == "pred")) // 8


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]  # of the outputs
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text in brackets: a constant's value, a parameter's number, else the operands
    attributes: str  # the text behind the brackets

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, or nothing."""
        found = re.search(rf"\b{attribute}=({NAME})", self.attributes)
        return found.group(1) if found else ""

    def branches(self) -> list[str]:
        """The computations of a conditional, in the order of the operands behind the first."""
        listed = re.search(r"branch_computations=\{(.*?)\}", self.attributes)
        if listed:
            return re.findall(NAME, listed.group(1))
        return [self.called("true_computation"), self.called("false_computation")]


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: Instruction

    def shapes(self, name: str) -> tuple[Shape, ...]:
        return self.instructions[name].shapes

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and int(i.inside) == number)


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    computations, entry = {}, ""
    for head, body in re.findall(r"^((?:ENTRY )?%[^\n]*)\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        name = re.findall(NAME, head)[0]
        if head.startswith("ENTRY"):
            entry = name
        lines = [line.strip() for line in body.splitlines() if line.strip()]
        root = next(line for line in lines if line.startswith("ROOT "))
        found = [instruction(line.removeprefix("ROOT ")) for line in lines]
        computations[name] = Computation({i.name: i for i in found}, instruction(root.removeprefix("ROOT ")))
    if not entry:
        raise ValueError(
            "no ENTRY computation in the text: it must be a whole program's, as compiled.as_text() gives it"
        )
    return Program(computations, entry)


def instruction(line: str) -> Instruction:
    match = re.match(rf"({NAME}) = (.*?) ([a-z][\w\-]*)\((.*)", line)
    if not match:
        raise ValueError(f"not an instruction of a compiled program: {line[:200]}")
    name, shapes, opcode, rest = match.groups()
    inside, attributes = brackets(rest)
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(NAME, inside))
    return Instruction(name, tuple(shapes_in(shapes)), opcode, operands, inside, attributes)


def brackets(text: str) -> tuple[str, str]:
    """The text up to the bracket that closes the one before it, and the text behind."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def shapes_in(text: str) -> Iterator[Shape]:
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text):
        yield Shape(dtype, tuple(int(d) for d in re.findall(r"\d+", dims)))


def total(
    program: Program,
    cost: Callable[[Computation, Instruction], int],
    name: str = "",
    arguments: Sequence[Any] = (),
) -> int:
    """The sum over a computation, the entry's by default, of what each instruction costs.

    `arguments` are what is `known` of the computation's parameters.
    """
    computation = program.computations[name or program.entry]

    def of(i: Instruction) -> int:
        if i.opcode not in ("while", "conditional", "call"):
            return cost(computation, i)
        given = [known(computation, operand, arguments) for operand in i.operands]
        if i.opcode == "while":
            return trips(program, i, given[0]) * total(program, cost, i.called("body"), [carried(program, i, given[0])])
        if i.opcode == "conditional":
            branches = zip(i.branches(), given[1:], strict=True)
            return min(total(program, cost, branch, [argument]) for branch, argument in branches)
        return total(program, cost, i.called("to_apply"), given)

    return sum(of(i) for i in computation.instructions.values())


def known(computation: Computation, name: str, arguments: Sequence[Any]) -> Any:
    """The integer that `name` holds, a list of such for a tuple, None for what only a run can tell."""
    i = computation.instructions[name]
    match i.opcode:
        case "constant":
            return int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None
        case "parameter":
            return arguments[int(i.inside)] if int(i.inside) < len(arguments) else None
        case "tuple":
            return [known(computation, operand, arguments) for operand in i.operands]
        case "get-tuple-element":
            whole = known(computation, i.operands[0], arguments)
            return whole[index(i)] if whole else None
        case "copy" | "bitcast" | "copy-done" | "copy-start":
            return known(computation, i.operands[0], arguments)
    return None


def index(i: Instruction) -> int:
    """Which entry a get-tuple-element takes."""
    return int(re.findall(r"index=(\d+)", i.attributes)[0])


def carried(program: Program, loop: Instruction, start: Any) -> Any:
    """What is known in every turn of a loop that starts with `start`: what its body passes on as it came."""
    body = program.computations[loop.called("body")]
    if not start or body.root.opcode != "tuple":
        return None
    passed = [body.instructions[operand] for operand in body.root.operands]
    return [
        value if i.opcode == "get-tuple-element" and index(i) == k and i.operands[0] == body.parameter(0).name else None
        for k, (i, value) in enumerate(zip(passed, start, strict=True))
    ]


def trips(program: Program, loop: Instruction, start: Any) -> int:
    """How often a loop's body runs; `start` is what is known of the tuple that it starts with."""
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written.group(1))
    condition = program.computations[loop.called("condition")]
    # A counter, of which the start is known, is compared with a bound, which the body leaves as it is.
    match compared(program, condition, [start]), compared(program, condition, [carried(program, loop, start)]):
        case ([int(first), int()], [None, int(bound)]) | ([int(), int(first)], [int(bound), None]):
            return abs(bound - first)
    raise ValueError(
        f"the trip count of {loop.name} is not to be found: it has no known_trip_count, and its condition "
        f"{loop.called('condition')} compares no counter with a constant"
    )


def compared(program: Program, computation: Computation, arguments: Sequence[Any]) -> list[int | None]:
    """What is known of the two numbers whose comparison a computation returns; nothing if it returns another thing."""
    root = computation.root
    operands = [known(computation, operand, arguments) for operand in root.operands]
    if root.opcode == "fusion":
        return compared(program, program.computations[root.called("calls")], operands)
    return operands if root.opcode == "compare" and re.search(r"direction=(LT|GT|NE)", root.attributes) else []


def cycles(text: str) -> int:
    """Cycles that a TPU's compiler expects a run of its program to take."""

    def estimated(_: Computation, i: Instruction) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        return int(found.group(1)) if found else 0

    return total(parse(text), estimated)
