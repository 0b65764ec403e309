"""As much of LLVM IR as the kernels need, written as text: functions, loops, branches, vectors of floats.

Values are strings: a register (`%7`) or a constant. Indices are i64, pointers are untyped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from fractions import Fraction

Number = Fraction | float


def constant(value: Number) -> str:
    """A float as LLVM reads it exactly: the bits of the double that equals the rounded float."""
    rounded = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


class Module:
    """Functions for vectors of `width` floats. `attributes` go to each of them; what they call is declared."""

    def __init__(self, width: int, attributes: str = "") -> None:
        self.width = width
        self.vector = f"<{width} x float>"
        self.attributes = attributes
        self.functions: list[Function] = []
        self.declarations: set[str] = set()

    def function(self, name: str, parameters: str, *, exported: bool = False, inline: bool = False) -> Function:
        """A new function without result. `parameters` as in IR: "ptr noalias %u, i64 %count"."""
        self.functions.append(Function(self, name, parameters, exported, inline))
        return self.functions[-1]

    def text(self) -> str:
        return "\n".join([*sorted(self.declarations), *(function.text() for function in self.functions)])


class Loop:
    """The inside of a `Function.loop`: its `index`, and the `values` that each pass takes over from the one before.

    `next` must be called with the values for the next pass. After the loop, `values` are the last ones.
    """

    def __init__(self, index: str, values: list[str]) -> None:
        self.index = index
        self.values = values
        self.following: list[str] = []

    def next(self, values: Sequence[str]) -> None:
        self.following = list(values)


class Function:
    """One function under construction; each method appends instructions and returns the register they set."""

    def __init__(self, module: Module, name: str, parameters: str, exported: bool, inline: bool) -> None:
        self.module = module
        linkage = "" if exported else "internal "
        extra = "alwaysinline" if inline else "noinline"
        self._head = f"define {linkage}void @{name}({parameters}) nounwind {extra} {module.attributes} {{\nentry:"
        self._lines: list[str] = []
        self._count = 0
        self._block = "entry"

    def text(self) -> str:
        return "\n".join([self._head, *self._lines, "  ret void\n}\n"])

    # -- instructions --------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def op(self, text: str) -> str:
        name = self._name()
        self.line(f"%{name} = {text}")
        return f"%{name}"

    def add(self, a: str, b: str | int) -> str:
        return self.op(f"add nsw i64 {a}, {b}")

    def sub(self, a: str, b: str | int) -> str:
        return self.op(f"sub nsw i64 {a}, {b}")

    def mul(self, a: str, b: str | int) -> str:
        return self.op(f"mul nsw i64 {a}, {b}")

    def divmod(self, a: str, b: str | int) -> tuple[str, str]:
        """Quotient and remainder of two numbers that are not negative."""
        return self.op(f"udiv i64 {a}, {b}"), self.op(f"urem i64 {a}, {b}")

    def compare(self, kind: str, a: str, b: str | int) -> str:
        return self.op(f"icmp {kind} i64 {a}, {b}")

    def both(self, a: str, b: str) -> str:
        return self.op(f"and i1 {a}, {b}")

    def minimum(self, a: str, b: str | int) -> str:
        return self.op(f"select i1 {self.compare('slt', a, b)}, i64 {a}, i64 {b}")

    def maximum(self, a: str, b: str | int) -> str:
        return self.op(f"select i1 {self.compare('sgt', a, b)}, i64 {a}, i64 {b}")

    def offset(self, pointer: str, index: str | int, kind: str = "float") -> str:
        return self.op(f"getelementptr {kind}, ptr {pointer}, i64 {index}")

    def load(self, kind: str, pointer: str, align: int = 4) -> str:
        return self.op(f"load {kind}, ptr {pointer}, align {align}")

    def store(self, kind: str, value: str, pointer: str, align: int = 4) -> None:
        self.line(f"store {kind} {value}, ptr {pointer}, align {align}")

    def call(self, name: str, *arguments: str) -> None:
        """Call a function of this module; the arguments with their types."""
        self.line(f"call void @{name}({', '.join(arguments)})")

    # -- control flow --------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(
        self, stop: str | int, *, start: str | int = 0, step: str | int = 1, carry: Sequence[tuple[str, str]] = ()
    ) -> Generator[Loop]:
        """`for index in range(start, stop, step)`; `carry` has type and first value of what passes hand on."""
        number = self._name()
        head, body, end = f"head{number}", f"body{number}", f"end{number}"
        before = self._block
        self.line(f"br label %{head}")
        self._open(head)
        names = [self._name() for _ in carry]
        place = len(self._lines)  # the phi nodes go here when the last block and values of the body are known
        loop = Loop(f"%i{number}", [f"%{name}" for name in names])
        self.line(f"br i1 %c{number}, label %{body}, label %{end}")
        self._open(body)
        yield loop
        following = self.add(loop.index, step)
        last = self._block
        self.line(f"br label %{head}")
        self._lines[place:place] = [
            f"  {loop.index} = phi i64 [ {start}, %{before} ], [ {following}, %{last} ]",
            *(
                f"  %{name} = phi {kind} [ {first}, %{before} ], [ {value}, %{last} ]"
                for name, (kind, first), value in zip(names, carry, loop.following, strict=True)
            ),
            f"  %c{number} = icmp slt i64 {loop.index}, {stop}",
        ]
        self._open(end)

    @contextmanager
    def claims(self, counter: str, count: str) -> Generator[str]:
        """Take the numbers below `count` off a counter that threads share, until none is left."""
        number = self._name()
        head, body, end = f"head{number}", f"body{number}", f"end{number}"
        self.line(f"br label %{head}")
        self._open(head)
        unit = self.op(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        self.line(f"br i1 {self.compare('slt', unit, count)}, label %{body}, label %{end}")
        self._open(body)
        yield unit
        self.line(f"br label %{head}")
        self._open(end)

    @contextmanager
    def when(self, condition: str) -> Generator[None]:
        number = self._name()
        self.line(f"br i1 {condition}, label %then{number}, label %end{number}")
        self._open(f"then{number}")
        yield
        self.line(f"br label %end{number}")
        self._open(f"end{number}")

    def choose(
        self, condition: str, kind: str, yes: Callable[[], Sequence[str]], no: Callable[[], Sequence[str]]
    ) -> list[str]:
        """The values that one of two pieces of code makes; both make the same number of the type `kind`."""
        number = self._name()
        self.line(f"br i1 {condition}, label %then{number}, label %else{number}")
        made: list[tuple[Sequence[str], str]] = []
        for label, write in (("then", yes), ("else", no)):
            self._open(f"{label}{number}")
            made.append((write(), self._block))
            self.line(f"br label %end{number}")
        self._open(f"end{number}")
        (a, then), (b, other) = made
        return [self.op(f"phi {kind} [ {x}, %{then} ], [ {y}, %{other} ]") for x, y in zip(a, b, strict=True)]

    def switch(self, value: str, cases: dict[int, Callable[[], None]]) -> None:
        """Run the case of `value`, which must be one of them."""
        number = self._name()
        labels = {case: f"case{number}_{case}" for case in cases}
        table = " ".join(f"i64 {case}, label %{label}" for case, label in labels.items())
        self.line(f"switch i64 {value}, label %end{number} [ {table} ]")
        for case, write in cases.items():
            self._open(labels[case])
            write()
            self.line(f"br label %end{number}")
        self._open(f"end{number}")

    # -- vectors -------------------------------------------------------------------------------------------------------

    def splat(self, value: Number) -> str:
        """A constant vector."""
        return "<" + ", ".join([f"float {constant(value)}"] * self.module.width) + ">"

    def spread(self, scalar: str, kind: str = "float") -> str:
        """A vector with a register in each lane."""
        vector = f"<{self.module.width} x {kind}>"
        one = self.op(f"insertelement {vector} poison, {kind} {scalar}, i64 0")
        return self.op(f"shufflevector {vector} {one}, {vector} poison, <{self.module.width} x i32> zeroinitializer")

    def lanes(self, count: str) -> str:
        """The mask of the first `count` lanes."""
        width = self.module.width
        numbers = "<" + ", ".join(f"i64 {lane}" for lane in range(width)) + ">"
        return self.op(f"icmp ult <{width} x i64> {numbers}, {self.spread(count, 'i64')}")

    def vadd(self, a: str, b: str) -> str:
        return self.op(f"fadd {self.module.vector} {a}, {b}")

    def vsub(self, a: str, b: str) -> str:
        return self.op(f"fsub {self.module.vector} {a}, {b}")

    def vmul(self, a: str, b: str) -> str:
        return self.op(f"fmul {self.module.vector} {a}, {b}")

    def vmuladd(self, a: str, b: str, c: str) -> str:
        """a b + c, in one rounding where the processor can."""
        v = self.module.vector
        name = f"@llvm.fmuladd.v{self.module.width}f32"
        self.module.declarations.add(f"declare {v} {name}({v}, {v}, {v})")
        return self.op(f"call {v} {name}({v} {a}, {v} {b}, {v} {c})")

    def vpositive(self, a: str) -> str:
        """max(a, 0); what is not a number stays so."""
        v = self.module.vector
        below = self.op(f"fcmp olt {v} {a}, zeroinitializer")
        return self.op(f"select <{self.module.width} x i1> {below}, {v} zeroinitializer, {v} {a}")

    def vload(self, pointer: str, mask: str | None = None, align: int = 4) -> str:
        """A vector from memory; lanes outside `mask` are not read and are zero."""
        v, w = self.module.vector, self.module.width
        if mask is None:
            return self.load(v, pointer, align)
        self.module.declarations.add(f"declare {v} @llvm.masked.load.v{w}f32.p0(ptr, i32 immarg, <{w} x i1>, {v})")
        return self.op(
            f"call {v} @llvm.masked.load.v{w}f32.p0(ptr {pointer}, i32 {align}, <{w} x i1> {mask}, {v} zeroinitializer)"
        )

    def vload_as_float(self, kind: str, pointer: str) -> str:
        """A vector from memory of floats or of another floating type."""
        if kind == "float":
            return self.vload(pointer)
        narrow = f"<{self.module.width} x {kind}>"
        return self.op(f"fpext {narrow} {self.load(narrow, pointer, 2)} to {self.module.vector}")

    def vstore(self, value: str, pointer: str, mask: str | None = None, align: int = 4) -> None:
        v, w = self.module.vector, self.module.width
        if mask is None:
            self.store(v, value, pointer, align)
            return
        self.module.declarations.add(f"declare void @llvm.masked.store.v{w}f32.p0({v}, ptr, i32 immarg, <{w} x i1>)")
        self.line(
            f"call void @llvm.masked.store.v{w}f32.p0({v} {value}, ptr {pointer}, i32 {align}, <{w} x i1> {mask})"
        )

    def prefetch(self, pointer: str) -> None:
        self.module.declarations.add("declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)")
        self.line(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 3, i32 1)")

    def _name(self) -> str:
        self._count += 1
        return f"r{self._count}"

    def _open(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label
