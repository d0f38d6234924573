"""Runs a server over the stand-in for the engine; prints its URL on stdout.

Arguments: seconds of a step, seconds of draining, and seconds until the engine fails, or 0.
"""

import sys
import threading

from dbrx_jax.demo import source_folder
from dbrx_jax.serving.app import create_app
from dbrx_jax.serving.server import bind, run_server, url_of
from dbrx_jax.serving.settings import Settings
from dbrx_jax.text.tokenizer import DbrxTokenizer
from tests.serving.fake_engine import FakeEngine


def main() -> int:
    step_seconds, drain_seconds, fail_seconds = map(float, sys.argv[1:])
    tokenizer = DbrxTokenizer.from_pretrained(source_folder())
    engine = FakeEngine(tokenizer, step_seconds=step_seconds)
    if fail_seconds:
        timer = threading.Timer(fail_seconds, engine.die, [RuntimeError("no more memory")])
        timer.daemon = True
        timer.start()
    settings = Settings(model_name="dbrx-demo", max_model_len=1024, vocab_size=2560, cache_blocks=64)
    app = create_app(engine, tokenizer, settings)
    bound = bind("127.0.0.1", 0)
    print(url_of(bound), flush=True)
    return run_server(app, bound, drain_seconds)


if __name__ == "__main__":
    sys.exit(main())
