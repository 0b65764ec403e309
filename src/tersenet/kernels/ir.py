"""As much of LLVM IR as the kernels need, written as text: functions, loops, branches, vectors of floats.

Values are strings: a register (`%7`) or a constant. Indices are i64, pointers are untyped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from tersenet.kernels.ir_vectors import Vectors


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


class Function(Vectors):
    """One function under construction; each method appends instructions and returns the register they set."""

    def __init__(self, module: Module, name: str, parameters: str, exported: bool, inline: bool) -> None:
        super().__init__(module)
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

    def following(self, row: str, column: str, width: str) -> list[str]:
        """Row and column of the next of the pixels that are numbered line by line."""
        moved = self.add(column, 1)
        is_last = self.compare("eq", moved, width)
        down = self.add(row, self.op(f"zext i1 {is_last} to i64"))
        return [down, self.op(f"select i1 {is_last}, i64 0, i64 {moved}")]

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

    def _name(self) -> str:
        self._count += 1
        return f"r{self._count}"

    def _open(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label
