"""Counts the programs that JAX compiles."""

from collections.abc import Callable

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0
_is_listening = False


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _count
    _count += event == _EVENT


def count_compilations() -> Callable[[], int]:
    """Returns a function that returns the number of programs compiled in this process since the first call of this."""
    global _is_listening
    if not _is_listening:
        jax.monitoring.register_event_duration_secs_listener(_listen)
        _is_listening = True
    return lambda: _count
