"""Tests of files of prompts: rows that are read as they are needed, lines that cannot be used, batches and seeds."""

import contextlib
import json

from dbrx_jax.cli.file_run import derive_seed
from dbrx_jax.cli.fixed_batches import batches
from dbrx_jax.cli.prompts import Item, PromptsFile, Row, parse_row
from dbrx_jax.generation_config import GenerationConfig


def test_rows_are_read_as_they_are_needed(tmp_path):
    import tracemalloc

    path = tmp_path / "p"
    path.write_text((json.dumps({"text": "a" * 10_000}) + "\n") * 500)  # 5 MB of rows without a prompt
    tracemalloc.start()
    try:
        with contextlib.closing(PromptsFile(path)) as prompts:
            assert sum(item.error is not None for item in prompts.items(None, {})) == 500
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_line_without_end_is_an_error_of_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("dbrx_jax.cli.prompts.MAX_LINE", 1 << 20)
    path = tmp_path / "p"
    path.write_bytes(b'"' + b"a" * (3 << 20) + b'"\n[]\n')
    with contextlib.closing(PromptsFile(path)) as prompts:
        first, second = prompts.items(None, {})
    assert first.error == "line 1: longer than 1 MiB"
    assert second.row.line == 2


def test_numbers_outside_json_are_refused():
    assert parse_row(3, b'{"prompt": "a", "x": NaN}').error == "line 3: not JSON (NaN is none of its numbers)"


def test_batches_share_options_but_for_the_seed():
    def item(line, error=None, seed=None, **options):
        config = None if error else GenerationConfig(**options)
        return Item(Row(line, {}, seed=seed), 0, [1], config, error)

    items = [item(0, seed=1), item(1, seed=2), item(2, "bad"), item(3, top_k=1), item(4, "bad"), item(5), item(6)]
    lines = [[i.row.line for i in batch] for batch in batches(items, 3)]
    assert lines == [[0, 1, 2], [3, 4], [5, 6]]


def test_seeds_of_rows_differ():
    seeds = {derive_seed(5, line, index) for line in range(100) for index in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 32 for seed in seeds)
