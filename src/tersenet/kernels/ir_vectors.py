"""Vectors of floats in LLVM IR: constants, arithmetic, masks, memory."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Protocol

Number = Fraction | float


def constant(value: Number) -> str:
    """A float as LLVM reads it exactly: the bits of the double that equals the rounded float."""
    rounded = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


class Setting(Protocol):
    """What a module fixes for all of its functions."""

    width: int
    vector: str
    declarations: set[str]


class Vectors(ABC):
    """Instructions on vectors of `module.width` floats; each returns the register it sets."""

    def __init__(self, module: Setting) -> None:
        self.module = module

    @abstractmethod
    def line(self, text: str) -> None:
        """Write one instruction."""

    @abstractmethod
    def op(self, text: str) -> str:
        """Write one with a result, and return its register."""

    @abstractmethod
    def load(self, kind: str, pointer: str, align: int = 4) -> str:
        """Read a value of the type `kind`."""

    @abstractmethod
    def store(self, kind: str, value: str, pointer: str, align: int = 4) -> None:
        """Write one."""

    def splat(self, value: Number) -> str:
        """A constant vector."""
        return "<" + ", ".join([f"float {constant(value)}"] * self.module.width) + ">"

    def spread(self, scalar: str, kind: str = "float") -> str:
        """A vector with a register in each lane."""
        vector = f"<{self.module.width} x {kind}>"
        one = self.op(f"insertelement {vector} poison, {kind} {scalar}, i64 0")
        return self.op(f"shufflevector {vector} {one}, {vector} poison, <{self.module.width} x i32> zeroinitializer")

    def lanes(self, count: str) -> str:
        """The mask of the first `count` lanes; `count` is below 2^31."""
        width = self.module.width
        numbers = "<" + ", ".join(f"i32 {lane}" for lane in range(width)) + ">"
        short = self.op(f"trunc i64 {count} to i32")
        return self.op(f"icmp slt <{width} x i32> {numbers}, {self.spread(short, 'i32')}")

    def masked(self, mask: str, condition: str) -> str:
        """`mask` where the condition holds, else no lane."""
        kind = f"<{self.module.width} x i1>"
        return self.op(f"select i1 {condition}, {kind} {mask}, {kind} zeroinitializer")

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

    def vcut(self, a: str, threshold: float) -> str:
        """`a`, but zero where it is no further than that from zero; what is not a number stays so."""
        v, width = self.module.vector, self.module.width
        below = self.op(f"fcmp ole {v} {a}, {self.splat(threshold)}")
        above = self.op(f"fcmp oge {v} {a}, {self.splat(-threshold)}")
        inside = self.op(f"and <{width} x i1> {below}, {above}")
        return self.op(f"select <{width} x i1> {inside}, {v} zeroinitializer, {v} {a}")

    def vgated(self, a: str, gate: str) -> str:
        """`a`, but zero where the gate is zero or below."""
        v = self.module.vector
        shut = self.op(f"fcmp ole {v} {gate}, zeroinitializer")
        return self.op(f"select <{self.module.width} x i1> {shut}, {v} zeroinitializer, {v} {a}")

    def vlarger(self, a: str, b: str) -> str:
        """max(a, b); what is not a number is larger than all."""
        v, mask = self.module.vector, f"<{self.module.width} x i1>"
        above = self.op(f"fcmp ogt {v} {a}, {b}")
        none = self.op(f"fcmp uno {v} {a}, {a}")
        return self.op(f"select {mask} {self.op(f'or {mask} {above}, {none}')}, {v} {a}, {v} {b}")

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

    def vgather(self, pointer: str, places: str) -> str:
        """A vector from floats that lie apart; `places`, in each lane an i64, count from `pointer`."""
        v, w = self.module.vector, self.module.width
        self.module.declarations.add(
            f"declare {v} @llvm.masked.gather.v{w}f32.v{w}p0(<{w} x ptr>, i32 immarg, <{w} x i1>, {v})"
        )
        apart = self.op(f"getelementptr float, ptr {pointer}, <{w} x i64> {places}")
        every = "<" + ", ".join(["i1 true"] * w) + ">"
        return self.op(
            f"call {v} @llvm.masked.gather.v{w}f32.v{w}p0(<{w} x ptr> {apart}, i32 4, <{w} x i1> {every}, {v} poison)"
        )

    def vscatter(self, value: str, pointer: str, places: str, mask: str) -> None:
        """A vector to memory, each lane of `mask` to its place; `places` as of `vgather`."""
        v, w = self.module.vector, self.module.width
        name = f"@llvm.masked.scatter.v{w}f32.v{w}p0"
        self.module.declarations.add(f"declare void {name}({v}, <{w} x ptr>, i32 immarg, <{w} x i1>)")
        apart = self.op(f"getelementptr float, ptr {pointer}, <{w} x i64> {places}")
        self.line(f"call void {name}({v} {value}, <{w} x ptr> {apart}, i32 4, <{w} x i1> {mask})")

    def prefetch(self, pointer: str, near: bool = True, write: bool = False) -> None:
        """Bring a line into the first-level cache, or only into the second; to be written, or read only."""
        self.module.declarations.add("declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)")
        self.line(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 {int(write)}, i32 {3 if near else 2}, i32 1)")
