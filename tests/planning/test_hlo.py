"""Tests of byte counts in compiled TPU and GPU programs against counts by hand.

tests/planning/hlo/ has their HLO, reduced to the parts that are parsed: compiled by libtpu 0.0.42 for v5e and tpu7x
and by jax-cuda13-plugin 0.10.2 for the H100. Scalars that a TPU's text puts in HBM count, so some sums have odd bytes.
"""

from pathlib import Path

import pytest

from dbrx_jax.planning.hlo import Collective, bytes_moved, collectives, hbm_traffic, largest_temporaries, launches

LOOP = {r"jit\(loop\)/while$": 10}


def program(name):
    return (Path(__file__).parent / "hlo" / f"{name}.hlo").read_text()


def traffic(name, trips=None):
    total = hbm_traffic(program(name), trips)
    assert sum(total.by_op.values()) == total.read + total.written
    return total.read, total.written


def kinds(name):
    return {(c.kind, c.operand_bytes, c.result_bytes, c.group_size, c.parameters) for c in collectives(program(name))}


def test_tpu_matmul_reads_weights_and_activations_once():
    """x is first copied asynchronously to on-chip memory; its bytes in HBM count once."""
    x, w, y = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2
    assert traffic("matmul_v5e") == (x + w, y)
    assert collectives(program("matmul_v5e")) == []


def test_gpu_split_k_matmul_writes_and_reads_its_parts():
    x, w, y, parts = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2, 4 * 64 * 10752 * 4
    assert traffic("matmul_h100") == (x + w + parts, parts + y)


def test_gpu_asynchronous_all_reduce_in_a_fusion_counts_once():
    """Compiled by jax-cuda13-plugin 0.12.0: the all-reduce is one of XLA's kernels."""
    x, w, y = 8 * 768 * 2, 768 * 6144 * 2, 8 * 6144 * 2
    assert traffic("async_psum_h100") == (x + w + 2 * y, 3 * y)
    assert kinds("async_psum_h100") == {("all-reduce", y, y, 8, ())}


def test_packed_int4_weight_counts_half_a_byte():
    assert traffic("int4_v5e") == (64 * 6144 * 2 + 10752 * 6144 // 2 + 10752 * 2, 64 * 10752 * 2)


def test_gpu_loop_updates_its_cache_in_place():
    w, x, parts = 24576 * 6144 * 2, 8 * 6144 * 2, 4 * 8 * 24576 * 4
    key = 8 * 8 * 1 * 128
    rows = 8 * 6144
    # The matmul; the update and the next x, which each sum four parts; the counter and its comparison.
    read = x + w + (4 * key * 4 + 4) + 4 * rows * 4 + 4 + 8
    written = parts + key * 2 + rows * 2 + 4 + 1
    # Outside, x and the counter are copied; the donated cache is not.
    assert traffic("loop_h100", LOOP) == (10 * read + x + 4, 10 * written + x + 4)
    assert traffic("loop_h100") == (read + x + 4, written + x + 4)


def test_tpu_loop_copies_its_cache_to_another_layout_and_back():
    w, x, cache = 24576 * 6144 * 2, 8 * 6144 * 2, 8 * 8 * 8192 * 128 * 2
    read = w + 8 + 8 + 4 + 8 + 8  # scalars: two sums, two comparisons, a select
    written = 8 * 8 * 1 * 128 * 2 + 4 + 1
    assert traffic("loop_v5e", LOOP) == (10 * read + x + 2 * cache + 4, 10 * written + x + 2 * cache + 4)
    first, second, third, *_ = largest_temporaries(program("loop_v5e"))
    assert (first.bytes, first.shape, first.opcode) == (cache, "bf16[8,8,8192,128]", "copy")
    assert (second.bytes, third.bytes) == (cache, x)


def test_update_of_a_buffer_not_donated_counts_its_copy():
    cache, rows = 16 * 8 * 4096 * 128 * 2, 16 * 8 * 128 * 2
    assert traffic("rows_h100") == (cache + rows + 16 * 4, cache + rows)
    assert [t.opcode for t in largest_temporaries(program("rows_h100"))] == ["copy"]


def test_update_of_a_buffer_read_later_counts_all_its_bytes():
    text = program("rows_h100").replace("fusion(%copy.2,", "fusion(%c.1,")  # arguments are read-only
    cache, rows = 16 * 8 * 4096 * 128 * 2, 16 * 8 * 128 * 2
    counted = hbm_traffic(text)
    assert counted.read == 2 * cache + rows + 16 * 4  # the remaining copy and the update
    assert counted.written == 2 * cache


def test_slice_in_a_fusion_counts_only_the_slice():
    x, expert, y = 64 * 6144 * 2, 10752 * 6144 * 2, 64 * 10752 * 2
    assert traffic("pick_v5e") == (x + expert + 4 + 4 + 4, y)  # one of four experts


def test_gpu_scan_copies_weights_of_each_layer():
    layer, x, parts = 4096 * 4096 * 2, 64 * 4096 * 2, 8 * 64 * 4096 * 4
    read = (layer + 4) + (layer + x) + parts + 4 + 4  # slice, matmul, activation, counter, comparison
    written = layer + parts + x + 4 + 1
    assert traffic("scan_h100", {"while": 99}) == (6 * read + x + 4, 6 * written + x + 4)  # its text gives 6 trips
    assert largest_temporaries(program("scan_h100"), 1)[0].bytes == layer


def test_tpu_scan_trip_count_is_read_from_constants():
    layer, x = 4096 * 4096 * 2, 64 * 4096 * 2
    read = layer + 4 + 4 + 8  # x stays on the chip; copy and sum of the counter, comparison
    assert traffic("scan_v5e") == (6 * read + x + 4, 6 * (4 + 1) + x + 4)


def test_conditional_counts_its_largest_branch():
    x, w = 64 * 4096 * 2, 4096 * 4096 * 2
    outside, branch = (x + 4 + 8, x + 4), (x + 2 * w, x)
    assert traffic("conditional_v5e") == (outside[0] + branch[0], outside[1] + branch[1])


def test_gpu_collectives_are_listed():
    w, h = 1024 * 6144 * 2, 64 * 8192 * 2
    assert kinds("gather_h100") == {
        ("all-gather", w, 4 * w, 4, ("w",)),
        ("all-reduce", h, h, 2, ()),
        ("reduce-scatter", h, h // 4, 4, ()),
    }


def test_tpu_collectives_and_traffic_are_counted():
    w, h = 1024 * 6144 * 2, 64 * 8192 * 2
    expected = {
        ("all-gather", w, 4 * w, 4, ("w",)),
        ("reduce-scatter", h, h // 4, 4, ()),
        ("all-reduce", h // 4, h // 4, 2, ()),
    }
    assert kinds("gather_v5e") == expected
    assert len(collectives(program("gather_v5e"))) == 3
    assert kinds("gather_tpu7x") == expected  # by calls to its SparseCores
    x, v, y, z = 64 * 6144 * 2, 8192 * 6144 * 2, 64 * 4096 * 2, 64 * 2048 * 2
    # v is copied to on-chip memory again for the next execution. The reduce-scatter stays on the chip.
    assert traffic("gather_v5e") == (x + v + w + 4 * w, 4 * w + y + z)
    # The tpu7x keeps h and the results of all three in HBM, and copies the last.
    assert traffic("gather_tpu7x") == (x + v + h + w + z + z + 4 * w, h + z + 4 * w + z + z + y)


def test_tpu_all_reduce_scatter_is_a_reduce_scatter():
    y = 4096 * 512 * 4
    (collective,) = collectives(program("scatter_v5e"))
    assert collective == Collective(
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
def test_replica_group_size_is_parsed(groups, size):
    text = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[64,6144]) -> bf16[128,6144] {{
  %x = bf16[64,6144]{{1,0}} parameter(0), metadata={{op_name="p[\\'w\\']"}}
  %copy = bf16[64,6144]{{1,0}} copy(%x)
  ROOT %all-gather = bf16[128,6144]{{1,0}} all-gather(%copy), channel_id=2, replica_groups={groups}, dimensions={{0}}
}}
"""
    (collective,) = collectives(text)
    assert collective.group_size == size
    assert collective.parameters == ("p['w']",)  # a copy of it


def test_collective_in_a_loop_counts_runs_and_traces_loop_invariant_arguments():
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
def test_bytes_moved_matches_each_collective(kind, moved):
    assert bytes_moved(Collective(kind, ("f32[200]",), 800, 400, 4, 1, "", ())) == moved


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%y = f32[8]{0} levitate(%x)", "levitate"),
        ("%y = f7[8]{0} negate(%x)", "f7"),
        ("%y is no instruction", "cannot read"),
        ("%y = f32[8]{0} all-reduce(%x), replica_groups=somehow", "groups"),
    ],
)
def test_unknown_instructions_are_rejected_by_name(line, message):
    text = f"""HloModule jit_f

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT {line}
}}
"""
    with pytest.raises(ValueError, match=message):
        hbm_traffic(text), collectives(text)


def test_paged_attention_reads_the_blocks_of_its_table():
    """Two rows with tables of 3 read 6 of 9 blocks, and two with tables of 5 read all."""
    for width, blocks in ((3, 6), (5, 9)):
        text = f"""HloModule jit_f

ENTRY %main (s: s32[2], t: s32[{2 * width}], q: bf16[2,16,128]) -> f32[2,16,128] {{
  %s = s32[2]{{0}} parameter(0)
  %t = s32[{2 * width}]{{0}} parameter(1)
  %q = bf16[2,16,128]{{2,1,0}} parameter(2)
  %k = bf16[9,256,128]{{2,1,0}} parameter(3)
  %v = bf16[9,256,128]{{2,1,0}} parameter(4)
  ROOT %out = f32[2,16,128]{{2,1,0}} custom-call(%s, %t, %q, %k, %v), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/cache_attention/pallas_call"}}
}}
"""
        total = hbm_traffic(text)
        assert total.read == 2 * blocks * 256 * 128 * 2 + 2 * 16 * 128 * 2 + 2 * 4 + 2 * width * 4
        assert total.written == 2 * 16 * 128 * 4


def test_attention_that_writes_its_token_counts_the_new_positions():
    """Pools are results in their operands' buffers: 3 rows write a position of 2 heads to each."""
    pool = "bf16[9,2,128,64]{3,2,1,0}"
    text = f"""HloModule jit_f, input_output_alias={{ {{0}}: (2, {{}}, may-alias), {{1}}: (3, {{}}, may-alias) }}

ENTRY %main (t: s32[3,2], q: bf16[3,2,8,64], k: {pool}, v: {pool}) -> (f32[3,2,8,64], {pool}, {pool}) {{
  %t = s32[3,2]{{1,0}} parameter(0)
  %q = bf16[3,2,8,64]{{3,2,1,0}} parameter(1)
  %k = {pool} parameter(2)
  %v = {pool} parameter(3)
  ROOT %out = (f32[3,2,8,64]{{3,2,1,0}}, {pool}, {pool}) custom-call(%t, %q, %k, %v), custom_call_target="mosaic_gpu", \
output_to_operand_aliasing={{{{1}}: (2, {{}}), {{2}}: (3, {{}})}}, metadata={{op_name="jit(f)/cache_attention/map"}}
}}
"""
    total = hbm_traffic(text)
    assert total.read == 2 * 6 * 2 * 128 * 64 * 2 + 3 * 2 * 8 * 64 * 2 + 3 * 2 * 4
    assert total.written == 3 * 2 * 8 * 64 * 4 + 2 * 3 * 2 * 64 * 2


def test_launches_are_kernels_and_copies_of_all_computations():
    """A loop of five kernels runs ten times, after two copies; views and control flow launch nothing."""
    found = launches(program("loop_h100"), LOOP)
    assert [(launch.opcode, launch.runs) for launch in found] == [("copy", 1)] * 2 + [("fusion", 10)] * 5
    (product,) = (launch for launch in found if launch.result == "f32[4,8,24576]")
    assert product.op_name.endswith("dot_general")


def test_text_without_hlo_module_is_rejected():
    with pytest.raises(ValueError, match="HloModule"):
        hbm_traffic("module @jit_f {}")
