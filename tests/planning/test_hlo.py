"""Counting on programs that the TPU and GPU compilers gave, against bytes worked out by hand.

tests/planning/hlo/ holds their texts, cut down to what is read: compiled by libtpu 0.0.42 for v5e and tpu7x and by
jax-cuda13-plugin 0.10.2 for the H100. Scalars that a TPU's text puts in HBM count, so some sums have odd bytes.
"""

from pathlib import Path

import pytest

from dbrx_jax.planning.hlo import Collective, bytes_moved, collectives, hbm_traffic, largest_temporaries

LOOP = {r"jit\(loop\)/while$": 10}


def program(name):
    return (Path(__file__).parent / "hlo" / f"{name}.hlo").read_text()


def traffic(name, trips=None):
    counted = hbm_traffic(program(name), trips)
    assert sum(counted.by_op.values()) == counted.read + counted.written
    return counted.read, counted.written


def kinds(name):
    return {(c.kind, c.operand_bytes, c.result_bytes, c.group_size, c.parameters) for c in collectives(program(name))}


def test_a_tpu_matmul_reads_weights_and_activations_once():
    """x goes to the chip by an asynchronous copy first: its bytes in HBM count once."""
    x, w, y = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2
    assert traffic("matmul_v5e") == (x + w, y)
    assert collectives(program("matmul_v5e")) == []


def test_a_gpu_matmul_split_in_four_writes_and_reads_its_parts():
    x, w, y, parts = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2, 4 * 64 * 10752 * 4
    assert traffic("matmul_h100") == (x + w + parts, parts + y)


def test_a_gpu_sum_over_devices_in_a_fusion_that_is_started_counts_as_one():
    """By jax-cuda13-plugin 0.12.0: the all-reduce is a kernel of XLA's own."""
    x, w, y = 8 * 768 * 2, 768 * 6144 * 2, 8 * 6144 * 2
    assert traffic("async_psum_h100") == (x + w + 2 * y, 3 * y)
    assert kinds("async_psum_h100") == {("all-reduce", y, y, 8, ())}


def test_packed_int4_weights_count_half_a_byte():
    assert traffic("int4_v5e") == (64 * 6144 * 2 + 10752 * 6144 // 2 + 10752 * 2, 64 * 10752 * 2)


def test_a_gpu_loop_updates_its_cache_in_place():
    w, x, parts = 24576 * 6144 * 2, 8 * 6144 * 2, 4 * 8 * 24576 * 4
    key = 8 * 8 * 1 * 128
    rows = 8 * 6144
    # The matmul; the update, which adds up four parts; the next x, likewise; the counter, and its comparison.
    read = x + w + (4 * key * 4 + 4) + 4 * rows * 4 + 4 + 8
    written = parts + key * 2 + rows * 2 + 4 + 1
    # Outside, x and the counter are copied; the donated cache is not.
    assert traffic("loop_h100", LOOP) == (10 * read + x + 4, 10 * written + x + 4)
    assert traffic("loop_h100") == (read + x + 4, written + x + 4)


def test_a_tpu_loop_copies_its_cache_into_another_layout_and_back():
    w, x, cache = 24576 * 6144 * 2, 8 * 6144 * 2, 8 * 8 * 8192 * 128 * 2
    read = w + 8 + 8 + 4 + 8 + 8  # scalars: two sums, two comparisons, a select
    written = 8 * 8 * 1 * 128 * 2 + 4 + 1
    assert traffic("loop_v5e", LOOP) == (10 * read + x + 2 * cache + 4, 10 * written + x + 2 * cache + 4)
    first, second, third, *_ = largest_temporaries(program("loop_v5e"))
    assert (first.bytes, first.shape, first.opcode) == (cache, "bf16[8,8,8192,128]", "copy")
    assert (second.bytes, third.bytes) == (cache, x)


def test_an_update_of_a_buffer_that_is_not_donated_copies_it():
    cache, rows = 16 * 8 * 4096 * 128 * 2, 16 * 8 * 128 * 2
    assert traffic("rows_h100") == (cache + rows + 16 * 4, cache + rows)
    assert [t.opcode for t in largest_temporaries(program("rows_h100"))] == ["copy"]


def test_an_update_of_a_buffer_that_is_read_later_counts_whole():
    text = program("rows_h100").replace("fusion(%copy.2,", "fusion(%c.1,")  # nobody may write over an argument
    cache, rows = 16 * 8 * 4096 * 128 * 2, 16 * 8 * 128 * 2
    counted = hbm_traffic(text)
    assert counted.read == 2 * cache + rows + 16 * 4  # the copy, which is still there, and the update
    assert counted.written == 2 * cache


def test_a_slice_inside_a_fusion_counts_as_the_slice():
    x, expert, y = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2
    assert traffic("pick_v5e") == (x + expert + 4 + 4 + 4, y)  # of four experts one


def test_a_gpu_scan_copies_each_layers_weights():
    layer, x, parts = 4096 * 4096 * 2, 64 * 4096 * 2, 8 * 64 * 4096 * 4
    read = (layer + 4) + (layer + x) + parts + 4 + 4  # slice, matmul, activation, counter, comparison
    written = layer + parts + x + 4 + 1
    assert traffic("scan_h100", {"while": 99}) == (6 * read + x + 4, 6 * written + x + 4)  # its 6 trips are known
    assert largest_temporaries(program("scan_h100"), 1)[0].bytes == layer


def test_a_tpu_scan_counts_its_trips_from_its_constants():
    layer, x = 4096 * 4096 * 2, 64 * 4096 * 2
    read = layer + 4 + 4 + 8  # x stays on the chip; copy and sum of the counter, comparison
    assert traffic("scan_v5e") == (6 * read + x + 4, 6 * (4 + 1) + x + 4)


def test_of_a_conditional_the_largest_branch_counts():
    x, w = 64 * 4096 * 2, 4096 * 4096 * 2
    outside, branch = (x + 4 + 8, x + 4), (x + 2 * w, x)
    assert traffic("conditional_v5e") == (outside[0] + branch[0], outside[1] + branch[1])


def test_gpu_collectives():
    w, h = 1024 * 6144 * 2, 64 * 8192 * 2
    assert kinds("gather_h100") == {
        ("all-gather", w, 4 * w, 4, ("w",)),
        ("all-reduce", h, h, 2, ()),
        ("reduce-scatter", h, h // 4, 4, ()),
    }


def test_tpu_collectives_and_one_that_runs_in_three_fusions():
    w, h = 1024 * 6144 * 2, 64 * 8192 * 2
    wanted = {
        ("all-gather", w, 4 * w, 4, ("w",)),
        ("reduce-scatter", h, h // 4, 4, ()),
        ("all-reduce", h // 4, h // 4, 2, ()),
    }
    assert kinds("gather_v5e") == wanted
    assert len(collectives(program("gather_v5e"))) == 3
    assert kinds("gather_tpu7x") == wanted  # by calls to its SparseCores
    x, v, y, z = 64 * 6144 * 2, 8192 * 6144 * 2, 64 * 4096 * 2, 64 * 2048 * 2
    # v is copied to the chip once more for the next execution. The reduce-scatter stays on the chip.
    assert traffic("gather_v5e") == (x + v + w + 4 * w, 4 * w + y + z)
    # The tpu7x keeps h and the results of all three in HBM, and copies the last.
    assert traffic("gather_tpu7x") == (x + v + h + w + z + z + 4 * w, h + z + 4 * w + z + z + y)


def test_a_tpus_all_reduce_scatter_is_a_reduce_scatter():
    y = 4096 * 512 * 4
    (found,) = collectives(program("scatter_v5e"))
    assert found == Collective(
        kind="reduce-scatter",
        operands=("f32[4096,512]",),
        operand_bytes=y,
        result_bytes=y // 2,
        group_size=2,
        runs=1,
        op_name="jit(rs)/dot_general",
        parameters=(),
    )


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", 2),
    ],
)
def test_groups(groups, size):
    text = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[64,6144]) -> bf16[128,6144] {{
  %x = bf16[64,6144]{{1,0}} parameter(0), metadata={{op_name="p[\\'w\\']"}}
  %copy = bf16[64,6144]{{1,0}} copy(%x)
  ROOT %all-gather = bf16[128,6144]{{1,0}} all-gather(%copy), channel_id=2, replica_groups={groups}, dimensions={{0}}
}}
"""
    (found,) = collectives(text)
    assert found.group_size == size
    assert found.parameters == ("p['w']",)  # a copy of it


def test_a_collective_in_a_loop_runs_as_often_and_sees_through_to_an_unchanged_argument():
    text = """HloModule jit_f, is_scheduled=true, num_partitions=4

%body (arg: (s32[], f32[8], f32[8])) -> (s32[], f32[8], f32[8]) {
  %arg = (s32[], f32[8]{0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = f32[8]{0} get-tuple-element(%arg), index=1
  %x = f32[8]{0} get-tuple-element(%arg), index=2
  %a = f32[8]{0} all-reduce(%w), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %b = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum
  %next = f32[8]{0} add(%a, %b)
  ROOT %out = (s32[], f32[8]{0}, f32[8]{0}) tuple(%i, %w, %next)
}

%condition (arg: (s32[], f32[8], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}, f32[8]{0}) parameter(0)
  ROOT %go = pred[] custom-call(%arg), custom_call_target="go"
}

ENTRY %main (w: f32[8], x: f32[8]) -> (s32[], f32[8], f32[8]) {
  %w = f32[8]{0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]{0}, f32[8]{0}) tuple(%zero, %w, %x)
  ROOT %while = (s32[], f32[8]{0}, f32[8]{0}) while(%init), condition=%condition, body=%body, \
metadata={op_name="jit(f)/while"}
}
"""
    first, second = collectives(text, {"while": 7})
    assert (first.runs, first.parameters) == (7, ("w",))
    assert (second.runs, second.parameters) == (7, ())


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("all-reduce", 2 * 3 / 4 * 800),
        ("all-gather", 3 / 4 * 400),  # of the result
        ("reduce-scatter", 3 / 4 * 800),
        ("all-to-all", 3 / 4 * 800),
        ("collective-permute", 800),
    ],
)
def test_bytes_moved(kind, moved):
    assert bytes_moved(Collective(kind, ("f32[200]",), 800, 400, 4, 1, "", ())) == moved


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("%y = f32[8]{0} levitate(%x)", "levitate"),
        ("%y = f7[8]{0} negate(%x)", "f7"),
        ("%y is no instruction", "cannot read"),
        ("%y = f32[8]{0} all-reduce(%x), replica_groups=somehow", "groups"),
    ],
)
def test_what_is_not_known_is_named(line, names):
    text = f"""HloModule jit_f

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT {line}
}}
"""
    with pytest.raises(ValueError, match=names):
        hbm_traffic(text), collectives(text)


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="HloModule"):
        hbm_traffic("module @jit_f {}")
