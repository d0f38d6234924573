"""Tests of what the commands and long work print: errors, progress and announcements."""

import contextlib
import errno
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace

import jax
import pytest

from dbrx_jax import console
from dbrx_jax.errors import CheckpointError


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command in this process; returns its exit status and its lines on stderr."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(command):
        with pytest.raises(SystemExit) as exit_info:
            console.run("p", command)
        return exit_info.value.code, capsys.readouterr().err.splitlines()

    return run


def script(code, redirect):
    """Runs Python code in a process of its own, with its outputs redirected as a shell does."""
    program = f"import sys\nfrom dbrx_jax import console\n{code}"
    shell = f'"$0" -c "$1" {redirect}'
    return subprocess.run(["sh", "-c", shell, sys.executable, program], capture_output=True, text=True, timeout=60)


def on_terminal(code):
    """Runs Python code with stderr on a terminal of 80 columns; returns what it shows."""
    master, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    program = f"import time\nfrom dbrx_jax import console\n{textwrap.dedent(code)}"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # when the other end is closed
        while piece := os.read(master, 1 << 16):
            shown += piece
    os.close(master)
    assert process.wait() == 0
    return shown.decode()


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("a\nb\x1b"), "p: a b\\x1b"),
        (OSError(errno.ENOSPC, "No space left on device"), "p: the output cannot be written: No space left on device"),
        (OSError(errno.EDQUOT, "Quota exceeded", "/f"), "p: /f cannot be written: Quota exceeded"),
        (MemoryError("Unable to allocate 8.00 PiB for"), "p: out of memory: 9,007,199.3 GB more did not fit; "),
    ],
)
def test_user_error_is_one_line(run, error, line):
    status, (only,) = run(lambda: raises(error))
    assert status == 2
    assert only.startswith(line)


def test_mistake_of_the_program_keeps_its_traceback(run):
    with pytest.raises(KeyError):
        console.run("p", lambda: {}["key"])


def test_warnings_are_lines(run):
    def command():
        warnings.simplefilter("always")
        warnings.warn("look\nhere", stacklevel=1)

    assert run(command) == (0, ["p: warning: look here"])


def test_full_disk_behind_stdout_is_one_line():
    """The text is still in the buffer when the command exits by itself."""
    done = script("console.run('p', lambda: (print('x'), sys.exit(1)))", ">/dev/full")
    assert done.returncode == 2
    assert done.stderr == "p: the output cannot be written: No space left on device\n"


def test_closed_pipe_behind_stdout_is_silent():
    done = script("console.run('p', lambda: [print('x' * 80) for _ in range(9999)])", "| true")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("redirect", "out", "err"), [(">&-", "", "status\n"), ("2>&-", "result\n", ""), ("2>/dev/full", "result\n", "")]
)
def test_command_runs_without_an_output(redirect, out, err):
    """A status line must not end up among the results, nor stop the work."""
    done = script("console.run('p', lambda: (print('result'), console.print_status('status')))", redirect)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_interrupt_does_not_wait_for_threads():
    """A thread in the middle of a large file must not keep a command alive, nor print its end."""
    code = """
        from dbrx_jax import console
        import threading, time
        def command():
            threading.Thread(target=time.sleep, args=(30,)).start()
            print("ready", flush=True)
            time.sleep(30)
        console.run("p", command)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "p: interrupted\n")
    assert time.monotonic() - begin < 10


class Stubborn:
    """An object whose destructor Ctrl-C hits; Python prints and forgets an exception there."""

    def __del__(self):
        raise KeyboardInterrupt


def test_interrupt_while_python_exits_is_quiet():
    """JAX's functions of atexit take a moment and would print a traceback."""
    code = """
        import atexit, time
        from dbrx_jax import console
        def leave():
            print("leaving", flush=True)
            time.sleep(30)
        console.run("p", lambda: atexit.register(leave))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_interrupt_in_a_destructor_is_not_lost(monkeypatch, capsys):
    def command():
        Stubborn()
        for _ in range(1000):
            time.sleep(0.001)

    monkeypatch.setattr(console, "_exit_at_once", lambda program: sys.exit("interrupted"))
    with pytest.raises(SystemExit, match="interrupted"):
        console.run("p", command)
    assert capsys.readouterr().err == ""


def test_interrupt_of_an_import_ends_at_once(tmp_path):
    """An extension that Ctrl-C stops raises an ImportError, or crashes."""
    code = """
        try:
            import os, signal
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            raise ImportError("Encountered an error while initializing the extension.")
    """
    (tmp_path / "extension.py").write_text(textwrap.dedent(code))
    done = script(f"sys.path.append({str(tmp_path)!r}); console.run('p', lambda: __import__('extension'))", "")
    assert (done.returncode, done.stderr) == (130, "p: interrupted\n")


def test_announcement_is_printed_once_work_lasts(capsys):
    with console.announce("Compiling", after=0.01, shown=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == "Compiling\n"
    with console.announce("Compiling", after=0.2, shown=True):
        pass
    time.sleep(0.3)  # as the timer would take
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("requested", [None, False])
def test_library_is_silent_where_nobody_watches(requested, capsys):
    with console.announce("Compiling", after=0, shown=requested), console.progress("x", 10, requested, 0) as advance:
        advance(5)
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_notebook_and_command_show_what_takes_long(monkeypatch):
    assert not console.is_shown(None)
    with monkeypatch.context() as patch:
        patch.setattr(console, "_runs_command", True)
        assert console.is_shown(None)
        assert not console.is_shown(False)
    ipython = type(sys)("IPython")
    ipython.get_ipython = lambda: type("Shell", (), {"kernel": object()})()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert console.is_shown(None)
    assert console.is_shown(True)


@pytest.mark.parametrize(("number", "is_shown"), [(0, True), (1, False)])
def test_only_the_first_process_shows_anything(monkeypatch, number, is_shown):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    assert console.is_shown(True) == is_shown


def test_progress_without_a_terminal_is_lines_with_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with console.progress("Loading", 6 * 10**9, shown=True) as advance:
        advance(2 * 10**9)
    assert capsys.readouterr().err == "Loading: 2.0 of 6.0 GB, 0.50 GB/s, 8 s left\n"


def test_progress_in_a_notebook_is_one_line_that_changes(monkeypatch):
    """It needs no widgets, which many notebooks lack."""
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    def display(data, raw, display_id):
        assert not shown
        handle.update(data, raw)
        return handle

    monkeypatch.setattr(console, "_in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    clock = iter([100.0, 101.0, 103.0, 103.1, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    def load():
        with console.progress("Loading", 8 * 10**9) as advance:
            for _ in range(4):
                advance(10**9)
            raise KeyboardInterrupt  # or without an error

    with pytest.raises(KeyboardInterrupt):
        load()
    assert shown == [
        "Loading: 2.0 of 8.0 GB, 0.67 GB/s, 9 s left",  # the first one after two seconds
        "Loading: 4.0 of 8.0 GB, 1.00 GB/s, 4 s left",
        "",
    ]


def test_bar_on_a_terminal_appears_late_and_goes():
    code = """
        for after in (60, 0.1):
            with console.progress("Loading", 263 * 10**9, after=after) as advance:
                advance(131 * 10**9)
                time.sleep(0.4)
                if after == 60:
                    console.print_status("not drawn yet")
    """
    shown = on_terminal(code)
    before, bar = shown.split("not drawn yet")
    assert before == ""
    assert "Loading ━" in bar
    assert "131.0/263.0 GB" in bar
    assert bar.endswith("\x1b[2K") or bar.endswith("\x1b[1A\x1b[2K")  # its line is erased
