"""Tests of unpacking weights for the grouped matmul on Hopper: JAX against integers, inline assembly against JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.kernels.gpu.grouped_unpack import PTX, unpack

ALL = np.arange(1 << 16, dtype=np.uint16)
POSITIONS = [(kind, position) for kind, instructions in PTX.items() for position in range(len(instructions))]


def unpacked(kind, position):
    return np.asarray(unpack(jnp.asarray(ALL.view(np.int16)), kind, position))


def run_ptx(text, pairs):
    """Runs instructions on uint32 values; returns $0."""
    registers = {"$1": pairs}
    for statement in text.strip("{} \n").split(";"):
        name, *operands = statement.replace(",", " ").split() or [".reg"]
        if name == ".reg":
            continue
        result, *values = operands
        values = [registers[v] if v in registers else np.uint32(int(v, 0)) for v in values]
        registers[result] = INSTRUCTIONS[name](*values)
    return registers["$0"]


def lop3(a, b, c, table):
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            operands = zip((a, b, c), (row >> 2 & 1, row >> 1 & 1, row & 1), strict=True)
            result |= np.bitwise_and.reduce([np.broadcast_to(v if bit else ~v, a.shape) for v, bit in operands])
    return result


def subtract_bfloat16(a, b):
    a, b = (np.broadcast_to(v, np.shape(ALL[::2])).astype(np.uint32).view(np.uint16) for v in (a, b))
    return (a.view(jnp.bfloat16) - b.view(jnp.bfloat16)).view(np.uint32)


INSTRUCTIONS = {
    "shr.b32": lambda a, n: a >> n,
    "mov.b32": lambda a: a,
    "lop3.b32": lop3,
    "sub.bf16x2": subtract_bfloat16,
}


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
def test_unpack_gives_the_integers(kind, position):
    bits = 4 if kind == "int4" else 8
    stored = ALL.astype(np.int64) >> bits * position & (1 << bits) - 1
    expected = np.where(stored >= 1 << bits - 1, stored - (1 << bits), stored)
    np.testing.assert_array_equal(unpacked(kind, position).astype(np.int64), expected)


@pytest.mark.parametrize("position", [0, 1])
def test_unpack_gives_fp8_values(position):
    stored = np.asarray(ALL >> 8 * position & 0xFF, np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    finite = np.isfinite(stored)
    np.testing.assert_array_equal(unpacked("fp8", position).astype(np.float32)[finite], stored[finite])


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
def test_inline_assembly_gives_the_same_bits(kind, position):
    actual = run_ptx(PTX[kind][position], ALL.view(np.uint32))
    np.testing.assert_array_equal(actual.view(np.uint16), unpacked(kind, position).view(np.uint16))
