"""Runs a server over the engine and a small random model; prints its URL on stdout when it takes requests.

The argument is a JSON object: options of the engine, with `blocks` of its cache in place of cache_gb, `positions` of
the model, and the server's `port` and `drain_seconds`.
"""

import json
import sys

from dbrx_jax import DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.engine.engine import Engine
from dbrx_jax.runtime import enable_compilation_cache
from dbrx_jax.serving.app import create_app
from dbrx_jax.serving.server import bind, run_server, url_of
from dbrx_jax.serving.settings import Settings
from tests.engine.conftest import cache_gb, small_model


def main() -> int:
    options = json.loads(sys.argv[1])
    bound, drain_seconds = bind("127.0.0.1", options.pop("port", 0)), options.pop("drain_seconds", 30.0)
    enable_compilation_cache()  # several servers are started
    model = small_model(max_seq_len=options.pop("positions", 1024))
    tokenizer = DbrxTokenizer.from_pretrained(source_folder())
    size = cache_gb(model, options.pop("blocks"))
    with Engine(model, tokenizer, max_rows=6, cache_gb=size, prefill_budget=16, **options) as engine:
        settings = Settings(
            model_name="small",
            max_model_len=engine.limits.positions,
            vocab_size=model.config.vocab_size,
            cache_blocks=engine.stats().blocks,
            defaults=model.generation_config,
            max_n=engine.limits.max_rows,
        )
        app = create_app(engine, tokenizer, settings, write_log=lambda line: print(line, flush=True))
        bound.listen()
        print(url_of(bound), flush=True)
        return run_server(app, bound, drain_seconds)


if __name__ == "__main__":
    sys.exit(main())
