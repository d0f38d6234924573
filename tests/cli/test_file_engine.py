"""Tests of the engine's sizes for a file of prompts."""

from dbrx_jax.cli import file_engine
from dbrx_jax.cli.file_run import FileRun
from dbrx_jax.cli.options import GenerateOptions
from dbrx_jax.cli.prompts import Survey
from dbrx_jax.cli.rates import EngineRates
from dbrx_jax.engine.memory import block_bytes
from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.generation import processes
from dbrx_jax.planning import memory_check


def test_cache_is_of_one_size_on_all_processes(models, monkeypatch):
    """The memory decides unless all rows fit that of every process."""
    model = models("fused")
    survey = Survey("", 9, 300, frozenset([290]), True, 0, None)  # 300 positions have a cache of 512
    run = FileRun(GenerateOptions(), None, survey, model, 5, 0, 7, False, EngineRates())
    blocks = int(file_engine._cache_gb(run) * 1e9 / block_bytes(model, model.dtype))
    assert blocks == 5 * 4 + 1

    def refuse(*_, **__):
        raise MemoryLimitError("memory")

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "least_on_all_processes", lambda _, fits: told.append(fits) or 0)  # another's is less
        assert file_engine._cache_gb(run) is None
        patch.setattr(memory_check, "check_memory", refuse)
        assert file_engine._cache_gb(run) is None
    assert told == [True, False]
