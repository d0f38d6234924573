"""The command dbrx-jax serve: an HTTP server with OpenAI's API."""

import contextlib
import dataclasses
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.arguments import Given
from dbrx_jax.cli.load import Checkpoint, load_weights, open_checkpoint
from dbrx_jax.cli.options import DistributedOptions
from dbrx_jax.console import print_status
from dbrx_jax.errors import ConfigError, GenerationError, install_advice

if TYPE_CHECKING:
    from dbrx_jax.engine.engine import Engine
    from dbrx_jax.serving.engine_interface import MakeConstraint
    from dbrx_jax.serving.settings import Settings

API_KEYS = "DBRX_API_KEYS"  # of the environment, separated by commas or white space
DEMO_NAME = "dbrx-demo"


@dataclasses.dataclass(frozen=True)
class Serve(DistributedOptions):
    """Serve a model over HTTP, with OpenAI's API.

    Without CHECKPOINT the included demo is served. SIGTERM or Ctrl-C lets requests end; a second Ctrl-C does not. Of
    several processes the first alone listens.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_name: Given[str] = None
    """Name of the model in requests and answers; the checkpoint's by default."""
    api_key_file: Given[Path] = None
    """File of API keys, one in a line; requests need one of them. The variable DBRX_API_KEYS may hold others."""
    allow_origin: Given[str] = None
    """Origins of web pages that may use the server, separated by commas; * is every page. None by default."""
    max_rows: Given[int] = None
    """Completions that are computed together."""
    cache_gb: Given[float] = None
    """Memory of the key-value cache on each device, in GB; what is free by default."""
    max_waiting: Given[int] = None
    """Requests that may wait; more are refused with status 429."""
    prefill_budget: Given[int] = None
    """Prompt tokens that are computed between two tokens of other requests; by default as many as keep that time below
    4 times what it takes without, as measured at the start."""
    speculation: Given[int] = None
    """Most tokens that a step guesses of a row from what it repeats, and verifies; 0, the default, is off."""
    no_warmup: bool = False
    """Compile each program when it is needed first, rather than all of them before the first request."""
    timeout: float = 600.0
    """Seconds after which a request ends with an error."""
    drain_seconds: float = 30.0
    """Seconds that requests have to end after SIGTERM or Ctrl-C."""

    def run(self) -> None:
        self._check()
        with self.joined() as first:
            if not first:
                self._follow()
                return
            keys = read_api_keys(self.api_key_file, os.environ)
            _require_packages()
            from dbrx_jax.serving.server import bind

            with contextlib.closing(bind(self.host, self.port)) as bound:
                status = self._serve(bound, keys)
            if status:
                sys.exit(status)

    def _check(self) -> None:
        """Checks the options that need no file."""
        self.check_distributed()
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"--port: expected a number from 0 to 65535, got {self.port}")
        above_zero = ("max_rows", "cache_gb", "max_waiting", "prefill_budget", "timeout")
        for name in above_zero:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise GenerationError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
        if self.speculation:
            from dbrx_jax.engine.speculation import check_speculation

            check_speculation(self.speculation, self.batch_invariant)
        if not 0 <= self.drain_seconds < float("inf"):
            raise GenerationError(f"--drain-seconds: expected a number of at least 0, got {self.drain_seconds:g}")

    def _serve(self, bound: socket.socket, keys: tuple[str, ...]) -> int:
        """Loads the model and serves it; returns the exit status."""
        from dbrx_jax.serving.app import create_app
        from dbrx_jax.serving.server import run_server, url_of
        from dbrx_jax.sharding.distributed import explain_loss

        checkpoint, engine = self._load()
        with engine:
            settings = self._settings(checkpoint, engine, bound, keys)
            app = create_app(engine, checkpoint.tokenizer, settings, _constraint_maker(checkpoint), _write_log)
            print_status(self._summary(settings, engine, url_of(bound)))
            status = run_server(app, bound, self.drain_seconds)
        if engine.error is not None and explain_loss(engine.error):
            raise engine.error
        return status

    def _follow(self) -> None:
        """Runs what the engine of the first process runs, until the server there ends."""
        _, engine = self._load()
        with engine:
            engine.follow()

    def _load(self) -> tuple[Checkpoint, "Engine"]:
        """Loads the model and starts its engine."""
        from dbrx_jax.engine.engine import Engine

        checkpoint = open_checkpoint(self)
        self.check_same("options", repr(checkpoint.config), ("host", "port", "api_key_file"))
        model = load_weights(checkpoint, self, 0, 0)
        names = ("max_rows", "cache_gb", "max_waiting", "prefill_budget", "cache_dtype", "speculation")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        options: dict[str, Any] = {"batch_invariant": self.batch_invariant, "warm_up": not self.no_warmup}
        return checkpoint, Engine(model, checkpoint.tokenizer, **options, **given)

    def _settings(
        self, checkpoint: Checkpoint, engine: "Engine", bound: socket.socket, keys: tuple[str, ...]
    ) -> "Settings":
        from dbrx_jax.serving.auth import LOOPBACK_HOSTS
        from dbrx_jax.serving.settings import Settings

        is_local = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
        if not is_local and not keys:
            print_status(f"Anyone who reaches {self.host} may use this server; --api-key-file asks for keys")
        blocks = engine.stats().blocks
        return Settings(
            model_name=self.model_name or _name_of(self.checkpoint),
            max_model_len=min(engine.limits.positions, blocks * engine.limits.block),
            vocab_size=checkpoint.config.vocab_size,
            cache_blocks=blocks,
            cache_block=engine.limits.block,
            defaults=checkpoint.generation,
            api_keys=keys,
            hosts=(*LOOPBACK_HOSTS, self.host) if is_local and not keys else (),
            allow_origins=tuple(filter(None, (one.strip() for one in (self.allow_origin or "").split(",")))),
            timeout=self.timeout,
            max_n=min(Settings.max_n, engine.limits.max_rows),
        )

    def _summary(self, settings: "Settings", engine: "Engine", url: str) -> str:
        """Returns the line that is printed when the server begins."""
        limits = engine.limits
        devices = "one device" if self.mesh is None else f"mesh {self.mesh}"
        count = len(settings.api_keys)
        keys = f"{count or 'no'} API key{'s' * (count != 1)}"
        return (
            f"Serving {settings.model_name} at {url}/v1 on {devices}: a cache of {settings.cache_blocks:,} blocks of "
            f"{limits.block} tokens, {limits.max_rows} rows, {limits.max_waiting} requests may wait, up to "
            f"{settings.max_model_len:,} tokens and {self.timeout:g} s a request, {keys}"
        )


def _constraint_maker(checkpoint: Checkpoint) -> "MakeConstraint | None":
    """Returns a function that makes constraints for structured output, or None where that is not possible."""
    from dbrx_jax.engine.constraints import Constraints

    try:
        constraints = Constraints(
            checkpoint.tokenizer, checkpoint.config.vocab_size, checkpoint.generation.eos_token_id
        )
    except GenerationError as error:
        print_status(f"Structured output is not available: {error}")
        return None

    def make_constraint(kind: str, value: Any) -> Any:
        make = getattr(constraints, kind)
        return make() if kind == "json_object" else make(value)

    return make_constraint


def read_api_keys(path: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the API keys of a file, one in a line, and of the environment.

    Raises:
      ConfigError: the file cannot be read, or has no key.
    """
    keys = environment.get(API_KEYS, "").replace(",", " ").split()
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(f"--api-key-file {path}: cannot be read ({reason})") from None
        in_file = [line.strip() for line in lines if line.strip()]
        if not in_file:
            raise ConfigError(f"--api-key-file {path}: there is no key; write one in a line")
        keys += in_file
    return tuple(dict.fromkeys(keys))


def _name_of(checkpoint: str | None) -> str:
    """Returns the model's name: that of the Hugging Face Hub, or the last part of a path or URL."""
    from dbrx_jax.hub import is_on_hub

    if checkpoint is None:
        return DEMO_NAME
    return checkpoint if is_on_hub(checkpoint) else checkpoint.rstrip("/").rpartition("/")[2] or checkpoint


def _require_packages() -> None:
    """Raises ConfigError if the packages of the server are not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serve: needs the package {error.name}; {install_advice('serve')}") from None


def _write_log(line: str) -> None:
    """Writes a line of the access log on stdout, unless nobody reads it."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the server goes on
