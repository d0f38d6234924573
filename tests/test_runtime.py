"""Tests of process settings and of the private compilation cache."""

import os
import resource
import warnings
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import dbrx_jax
from dbrx_jax.runtime import enable_compilation_cache, set_process_defaults
from tests.cli.test_cli import command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
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
    cache.parent.write_text("")
    lines = []
    enable_compilation_cache(lines.append)
    folder = "XDG_CACHE_HOME names another folder"
    assert lines == [f"Compiled programs are not cached: {cache}: Not a directory; {folder}"]


def test_configured_cache_folder_is_kept(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache(lambda _: None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not cache.exists()


def test_user_without_a_home_is_told(cache, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    dbrx_jax.enable_compilation_cache()
    line = "Compiled programs are not cached: Could not determine home directory; XDG_CACHE_HOME names another folder\n"
    assert capsys.readouterr().err == line
    assert jax.config.jax_compilation_cache_dir is None


class TestDamagedCache:
    """JAX compiles a program whose file it cannot read, but leaves that file there and warns in every run."""

    @pytest.fixture
    def compile(self, cache, monkeypatch):
        """A function that compiles a program as a new process would, and returns what was printed so far."""
        lines = []
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: lines.append(f"warning: {message}"))
        enable_compilation_cache(lines.append)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

        def compile(rows):
            jax.clear_caches()
            compilation_cache.reset_cache()
            jax.jit(_program).lower(jax.ShapeDtypeStruct((rows,), "float32")).compile()
            return lines

        yield compile
        compilation_cache.reset_cache()

    @pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "half"])
    def test_damaged_file_is_compiled_again_and_replaced(self, compile, cache, damage):
        assert compile(7) == []
        (file,) = cache.glob("jit__program-*-cache")
        intact = file.read_bytes()
        file.write_bytes(intact[: len(intact) // 2] if damage is None else damage)
        assert compile(7) == []
        assert len(file.read_bytes()) == pytest.approx(len(intact), rel=0.1)
        changed = file.stat().st_mtime_ns
        assert compile(7) == []
        assert file.stat().st_mtime_ns == changed

    def test_folder_that_cannot_be_written_is_reported_once(self, compile, cache):
        """A limit of the size of files stands for a full disk: it leaves empty files."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            compile(7)
            lines = compile(8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert lines == [f"Compiled programs are not cached: {cache}: File too large"]
        compile(7)
        compile(8)
        assert all(file.stat().st_size > 100 for file in cache.glob("jit__program-*-cache"))
        assert len(lines) == 1

    def test_other_warnings_are_shown_as_before(self, compile):
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)
        assert compile(7) == ["warning: mind the gap"]


def _program(x):
    return x * 2 + 1


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
