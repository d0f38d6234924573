"""Tests of the command verify: settings beside the weights, and its summary."""

import json
import shutil

import pytest

from dbrx_convert.compare_settings import compare_settings
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import Difference
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.demo import source_folder
from tests.commands import in_process
from tests.conftest import GOLDEN

DEMO = source_folder()


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


CHANGES = {
    "config.json": (
        lambda c: c["ffn_config"].update(moe_top_k=1),
        Difference("configuration", "setting", "moe_top_k: 4 against 1"),
    ),
    "generation_config.json": (
        lambda c: c.update(eos_token_id=[7]),
        Difference("generation configuration", "setting", "eos_token_id: [2550, 2553] against [7]"),
    ),
    "tokenizer_config.json": (
        lambda c: c.update(chat_template="{% for message in messages %}x{% endfor %}"),
        Difference(
            "chat template",
            "setting",
            """from character 29 on: "{% if not loop.first %}{{ '\\\\n'" against 'x{% endfor %}'""",
        ),
    ),
    "tokenizer.json": (
        lambda c: c["model"]["vocab"].update(a=65, b=64),
        Difference("tokenizer", "setting", "64: b'a' against b'b' (and 1 more)"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_differ_are_named(name, tmp_path):
    change, want = CHANGES[name]
    shutil.copytree(DEMO, tmp_path / "b")
    edit(tmp_path / "b" / name, change)
    assert list(compare_settings(open_folder(DEMO), open_folder(tmp_path / "b"))) == [want]


def test_missing_tokenizer_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    shutil.copytree(DEMO, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    (difference,) = compare_settings(open_folder(tmp_path / "b"), open_folder(DEMO))
    assert (difference.name, difference.kind) == ("tokenizer", "missing")
    assert difference.detail.startswith("only in the second: ")
    assert list(compare_settings(open_folder(tmp_path / "b"), open_folder(tmp_path / "b"))) == []


def test_summary_is_one_line_and_verbose_lists_all(tmp_path):
    to_orbax(GOLDEN / "fused", tmp_path / "low", dtype="bfloat16")
    short = in_process("dbrx-convert", "verify", GOLDEN / "fused", tmp_path / "low")
    long = in_process("dbrx-convert", "verify", GOLDEN / "fused", tmp_path / "low", "--verbose")
    assert short.returncode == long.returncode == 1
    (line,) = short.stdout.splitlines()
    *lines, last = long.stdout.splitlines()
    assert last == line
    assert len(lines) == int(line.split()[0])
    assert line.startswith(f"{len(lines)} of 168 parameters differ (")
    worst = line.split("; the most: ")[1]
    name, _, detail = worst.partition(", ")
    assert f"{name}: values: {detail}" in lines
    relative = [float(text.split("(relative ")[1].split(")")[0]) for text in lines if "relative" in text]
    assert float(detail.split("(relative ")[1].split(")")[0]) == max(relative)
