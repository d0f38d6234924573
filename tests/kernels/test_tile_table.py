"""Tests of the table of tile sizes and of the search that writes it."""

import json

import pytest

from benchmarks.tiles import cases, search
from dbrx_jax.kernels.tile_table import TABLE, name_of, table
from dbrx_jax.kernels.tpu import decode_experts as tpu_decode_experts


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_table_has_a_candidate_for_every_matmul_of_132b(kind):
    entries = json.loads(TABLE.read_text())
    slots = [slot for case in cases(kind) for slot in case.slots]
    assert len({slot.name for slot in slots}) >= 18
    for slot in slots:
        assert slot.rule in slot.candidates
        assert entries[slot.name]["tiles"] in [list(t) for t in slot.candidates], slot.name
        if entries[slot.name]["by"] == "rule, not timed":
            assert entries[slot.name]["tiles"] == list(slot.rule), slot.name


def test_search_finds_the_fastest_tiles_of_each_slot():
    case = next(c for c in cases("gpu") if len(c.slots) == 2)
    first, second = case.slots
    best = {first.name: first.candidates[-1], second.name: second.candidates[1]}
    assert best != {slot.name: slot.rule for slot in case.slots}

    def seconds(tiles):  # the second slot improves only with the best first
        return 3 - (tiles[first.name] == best[first.name]) * (1 + (tiles[second.name] == best[second.name]))

    assert search(case, seconds) == best


def test_default_tiles_come_from_the_table_when_valid(monkeypatch):
    case = next(cases("tpu"))
    (slot,), (x, w1, *_) = case.slots, case.arguments
    other = next(t for t in slot.candidates if t != slot.rule)
    monkeypatch.setattr(tpu_decode_experts, "table", lambda: {slot.name: list(other)})
    assert tpu_decode_experts.default_tiles(x, w1) == other
    monkeypatch.setattr(tpu_decode_experts, "table", lambda: {slot.name: [7]})
    assert tpu_decode_experts.default_tiles(x, w1) in slot.candidates
    assert tpu_decode_experts.default_tiles(x, w1) != tpu_decode_experts.DecodeTiles(7)


def test_name_of_rounds_rows_up():
    assert name_of("k", "int4", 128, (3, 5), 9) == "k, int4 by 128, 3 x 5, 16 rows"
    assert name_of("k", "int8", None, (3, 5), 1) == "k, int8, 3 x 5, 8 rows"
    assert set(table()) == set(json.loads(TABLE.read_text()))
