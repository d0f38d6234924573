"""Tests of the process that renders chat templates: one for all, limited, replaced, and gone at the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from dbrx_jax.errors import TokenizerError
from dbrx_jax.text import chat_template
from dbrx_jax.text.chat_template import render

QUESTION = [{"role": "user", "content": "q"}]


@pytest.fixture
def worker(monkeypatch):
    """A worker of the test's own."""
    result = chat_template._Worker()
    monkeypatch.setattr(chat_template, "_worker", result)
    yield result
    result.stop()


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


class TestWorker:
    def pid(self, worker):
        render("", {}, {})
        return worker._running[0].pid

    def test_one_process_serves_all(self, worker):
        assert self.pid(worker) == self.pid(worker)
        begin = time.perf_counter()
        for i in range(50):
            assert render("{{ x }}", {"x": i}, {}).text == str(i)
        assert time.perf_counter() - begin < 50 * 0.02  # a new process takes 0.06 s or more

    def test_rendering_cannot_change_the_next(self, worker):
        vandal = (
            "{% set range = 5 %}{% set namespace = 6 %}{% macro raise_exception(x) %}{% endmacro %}"
            "{% set x = 'theirs' %}{% set ns = namespace %}{{ range }}"
            "{{ messages[0].update }}{{ self.__init__ }}{{ cycler.x }}"
        )
        probe = "{{ x is defined }}{{ range(2) | list }}{% set ns = namespace(a=1) %}{{ ns.a }}"
        assert render(vandal, {"messages": QUESTION}, {}).text == render(vandal, {"messages": QUESTION}, {}).text
        assert render(probe, {}, {}).text == "False[0, 1]1"
        keeps = "{% set kept = kept | default('none') %}{{ kept }}{% set kept = x %}"
        assert [render(keeps, {"x": "old"}, {}).text for _ in range(2)] == ["none", "none"]

    def test_killed_process_is_replaced(self, worker):
        first = self.pid(worker)
        os.kill(first, signal.SIGKILL)
        assert render("{{ x }}", {"x": "y"}, {}).text == "y"
        assert self.pid(worker) != first

    def test_memory_and_time_are_limited(self, worker, monkeypatch):
        first = self.pid(worker)
        with pytest.raises(TokenizerError, match="it needed more than 1024 MiB"):
            render("{{ 'a' * 10 ** 9 }}{{ 'a' * 10 ** 9 }}", {}, {})
        monkeypatch.setattr(chat_template, "SECONDS", 1)
        with pytest.raises(TokenizerError, match="it ran for more than 1 seconds"):
            render(ENDLESS, {}, {})
        monkeypatch.undo()
        assert render("x", {}, {}).text == "x"
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    def test_process_ends_itself_if_nobody_stops_it(self, worker, monkeypatch):
        monkeypatch.setattr(chat_template, "SECONDS", 0)
        worker._start()
        with pytest.raises(chat_template._WorkerError, match=r"its process, held to .*, ended \(status -14\)"):
            worker._exchange(json.dumps({"template": ENDLESS, "variables": {}, "special_tokens": {}}).encode(), 30)

    def test_failed_start_says_why(self, worker, monkeypatch):
        monkeypatch.setattr(chat_template, "_PROGRAM", "raise TypeError('why')")
        with pytest.raises(TokenizerError, match=r"ended \(TypeError: why\)"):
            render("", {}, {})

    def test_missing_interpreter_is_reported(self, worker, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere")
        with pytest.raises(TokenizerError, match=r"cannot start \(No such file or directory\)"):
            render("", {}, {})

    def test_process_ends_with_its_connection(self, worker):
        self.pid(worker)
        process, connection = worker._running
        connection.shutdown(2)
        assert process.wait(timeout=30) == 0

    def test_ctrl_c_is_not_for_the_process(self, worker):
        assert os.getpgid(self.pid(worker)) != os.getpgid(0)

    def test_interrupted_rendering_leaves_no_reply_behind(self, worker, monkeypatch):
        self.pid(worker)
        with monkeypatch.context() as patch:
            patch.setattr(chat_template, "_receive", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                render("old", {}, {})
        assert render("new", {}, {}).text == "new"

    def test_threads_get_their_own_replies(self, worker):
        wrong = []

        def chat(name):
            texts = [render("{{ x }}{{ i }}", {"x": name, "i": i}, {}).text for i in range(50)]
            wrong.extend(text for i, text in enumerate(texts) if text != f"{name}{i}")

        threads = [threading.Thread(target=chat, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_forked_child_has_a_process_of_its_own(self):
        worker = chat_template._worker
        first = self.pid(worker)
        with warnings.catch_warnings(), worker._lock:  # held, as if another thread rendered
            warnings.simplefilter("ignore")  # of JAX about forks
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    other = self.pid(worker)
                    worker.stop()
                    os._exit(other == first)
                except BaseException:
                    os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert self.pid(worker) == first

    def test_exit_is_quiet_and_leaves_no_process(self):
        code = (
            "import dbrx_jax.text.chat_template as c; print(c.render('{{ x }}', {'x': 1}, {}).text); "
            "print(c._worker._running[0].pid)"
        )
        done = subprocess.run([sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", code],
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        text, pid = done.stdout.split()
        assert (done.returncode, done.stderr, text) == (0, "", "1")
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
