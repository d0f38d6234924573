"""Settings of a program that owns its process, and compiled programs kept where nobody else can put any."""

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


def test_a_folder_of_ones_own_is_made(cache):
    lines = []
    enable_compilation_cache(lines.append)
    assert lines == []
    assert jax.config.jax_compilation_cache_dir == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_write_to_is_not_used(cache, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    lines = []
    enable_compilation_cache(lines.append)
    assert jax.config.jax_compilation_cache_dir is None
    assert "is not yours alone to write to" in lines[0]


def test_a_link_is_not_used(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    enable_compilation_cache(lambda _: None)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_file_in_its_place_is_said(cache):
    cache.parent.mkdir()
    cache.write_text("")
    lines = []
    enable_compilation_cache(lines.append)
    assert "cannot be used" in lines[0]


def test_the_users_own_choice_stays(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache(lambda _: None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not cache.exists()


@pytest.mark.slow
def test_a_second_run_finds_what_the_first_compiled(cache):
    """The two large programs, that is: whether a small one is slow enough to be kept depends on the machine."""

    def kept():
        large = [f for f in cache.glob("jit_*-cache") if f.name.startswith(("jit_decode-", "jit_prefill_chunk-"))]
        return {f.name: f.stat().st_mtime_ns for f in large}

    words = ("dbrx-jax", "generate", "--prompt", "A list", "--max-new-tokens", "3")
    first = command(*words)
    before = kept()
    assert len(before) == 2
    second = command(*words)
    assert second.stdout == first.stdout
    assert kept() == before
    assert "error" not in second.stderr.lower()


def test_own_process_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # so that what is set here is undone
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    set_process_defaults()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    set_process_defaults()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
