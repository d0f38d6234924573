"""Tests of process settings and of the private compilation cache."""

import os

import jax
import pytest

from dbrx_jax.runtime import enable_compilation_cache, set_process_defaults
from tests.cli.test_cli import command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "dbrx_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_cache_folder_is_created_private(cache):
    lines = []
    enable_compilation_cache(lines.append)
    assert lines == []
    assert jax.config.jax_compilation_cache_dir == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_cache_folder_writable_by_others_is_not_used(cache, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    lines = []
    enable_compilation_cache(lines.append)
    assert jax.config.jax_compilation_cache_dir is None
    assert "is not yours alone to write to" in lines[0]


def test_symlinked_cache_folder_is_not_used(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    enable_compilation_cache(lambda _: None)
    assert jax.config.jax_compilation_cache_dir is None


def test_file_in_place_of_cache_folder_is_reported(cache):
    cache.parent.mkdir()
    cache.write_text("")
    lines = []
    enable_compilation_cache(lines.append)
    assert "cannot be used" in lines[0]


def test_configured_cache_folder_is_kept(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache(lambda _: None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not cache.exists()


@pytest.mark.slow
def test_second_run_reuses_compiled_programs(cache):
    """Checks the two large programs; on a fast machine small ones may not be cached."""

    def cached_programs():
        large = [f for f in cache.glob("jit_*-cache") if f.name.startswith(("jit_decode-", "jit_prefill_chunk-"))]
        return {f.name: f.stat().st_mtime_ns for f in large}

    arguments = ("dbrx-jax", "generate", "--prompt", "A list", "--max-new-tokens", "3")
    first = command(*arguments)
    before = cached_programs()
    assert len(before) == 2
    second = command(*arguments)
    assert second.stdout == first.stdout
    assert cached_programs() == before
    assert "error" not in second.stderr.lower()


def test_process_defaults_keep_user_settings(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # restored after the test
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    set_process_defaults()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    set_process_defaults()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
