"""The command dbrx-jax: generate, chat, plan and info."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import tyro

from dbrx_jax.cli.plan import Plan
from dbrx_jax.console import print_status, run
from dbrx_jax.errors import GenerationError
from dbrx_jax.runtime import set_process_defaults

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.text.tokenizer import DbrxTokenizer

# Positions of a conversation's cache, at most the model's. One length for all turns shares the compiled programs.
CHAT_CACHE_LENGTH = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of both generate and chat."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Cast the weights on loading; unchanged by default."""
    quantization: str | None = None
    """Quantise the weights on loading: int8, int4 (experts in groups of 128, the rest int8; also int4-64 and int4-32),
    fp8, or parts such as experts=int4-64,attention=int8."""
    mesh: str | None = None
    """Device mesh: a recipe such as v5e-64, or axes such as expert=16,tensor=4; one device by default."""
    ranks_file: Path | None = None
    """A tiktoken ranks file, for checkpoints without a vocabulary."""
    max_new_tokens: int = 256
    """Maximum number of new tokens per prompt."""
    top_k: int | None = None
    """Sample from the k most probable tokens."""
    top_p: float | None = None
    """Sample from the most probable tokens that together reach this probability."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as probable as the most probable."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens already in the text less probable."""
    seed: int | None = None
    """Random seed; the same one gives the same text."""
    cache_dtype: Literal["int8"] | None = None
    """int8 halves the memory of a bfloat16 model's key-value cache."""
    batch_invariant: bool = False
    """Make each prompt's result bit-identical in batches of any size; slower, most of all for few prompts."""

    def generate_options(self, temperature: float) -> dict[str, Any]:
        """Returns the keyword arguments of generate; a temperature of 0 is greedy decoding."""
        names = ["max_new_tokens", "repetition_penalty", "seed", "cache_dtype", "batch_invariant"]
        filters = ["top_k", "top_p", "min_p"]
        if temperature != 0:
            options = {name: getattr(self, name) for name in names + filters}
            return options | {"do_sample": True, "temperature": temperature}
        if any(getattr(self, name) is not None for name in filters):
            raise GenerationError("--top-k, --top-p and --min-p draw at random; give --temperature above 0 with them")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Generate(Options):
    """Complete a prompt or a file of prompts. Without CHECKPOINT the included demo is used."""

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Orbax folder made by dbrx-convert, or Hugging Face folder of safetensors."""
    prompt: str | None = None
    """Prompt to complete; its completion streams to stdout."""
    file: Path | None = None
    """JSON lines, each a text, {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}."""
    output: Path | None = None
    """File to write the completions of --file to, as JSON lines; stdout by default."""
    chat: bool = False
    """Apply the checkpoint's chat template to --prompt as a user message."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples, more at random the higher."""
    stop: tuple[str, ...] = ()
    """Stop strings: each ends a completion and is cut off."""
    batch_size: int = 8
    """Number of prompts of --file in a batch."""
    distributed: bool = False
    """Run as one of several processes, each started with this command; only the first prints and writes."""
    coordinator: str | None = None
    """HOST:PORT of the first process. Cloud TPU, GKE and SLURM provide this and the next two options."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""

    def run(self) -> None:
        if (self.prompt is None) == (self.file is None):
            raise GenerationError("generate: give either --prompt TEXT or --file PROMPTS.jsonl")
        if self.prompt is not None and self.output is not None:
            raise GenerationError("--output goes with --file; the completion of --prompt goes to stdout")
        if self.batch_size < 1:
            raise GenerationError(f"--batch-size: expected a whole number above 0, got {self.batch_size}")
        if not self.distributed:
            if (self.coordinator, self.processes, self.process_id) != (None, None, None):
                raise GenerationError("--coordinator, --processes and --process-id go with --distributed")
            self._generate(self._requests(), self.output)
            return
        if self.mesh is None:
            raise GenerationError("--distributed needs --mesh, to lay the model over the devices of all processes")
        from dbrx_jax.sharding import distributed

        with distributed.start(self.coordinator, self.processes, self.process_id) as first:
            requests = self._requests()
            # These may differ between processes.
            names = ("process_id", "coordinator", "checkpoint", "ranks_file", "file", "output")
            unset: dict[str, Any] = dict.fromkeys(names)
            distributed.check_same("options and prompts", repr((dataclasses.replace(self, **unset), requests)))
            self._generate(requests, self.output if first else None)

    def _requests(self) -> list["_Request"]:
        if self.file is not None:
            return _read_requests(self.file)
        if self.chat:
            return [_Request({}, None, [{"role": "user", "content": self.prompt or ""}])]
        return [_Request({}, self.prompt, None)]

    def _generate(self, requests: list["_Request"], output: Path | None) -> None:
        model, tokenizer = _load(self.checkpoint, self)
        options = self.generate_options(self.temperature) | {"stop_strings": self.stop, "tokenizer": tokenizer}
        rates = _Rates()
        if self.file is None:
            for text in _stream(model, tokenizer, requests[0].token_ids(tokenizer), rates, options):
                print(text, end="", flush=True)
            print()
        else:
            max_seq_len = model.config.max_seq_len
            for number, request in enumerate(requests, 1):
                excess = len(request.token_ids(tokenizer)) + self.max_new_tokens - max_seq_len
                if excess > 0:
                    raise GenerationError(
                        f"{self.file}, prompt {number}: with {self.max_new_tokens} new tokens it is {excess} over the "
                        f"model's {max_seq_len}; shorten it"
                    )
            with _open_output(output) as file:
                for start in range(0, len(requests), self.batch_size):
                    batch = requests[start : start + self.batch_size]
                    for result in _complete(model, tokenizer, batch, rates, options):
                        print(json.dumps(result, ensure_ascii=False), file=file, flush=True)
                    if len(requests) > self.batch_size:
                        print_status(f"{start + len(batch)} of {len(requests)} prompts")
        print_status(rates.summary())


@dataclasses.dataclass(frozen=True)
class Chat(Options):
    """Chat with a model. Without CHECKPOINT the included demo is used."""

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Orbax folder made by dbrx-convert, or Hugging Face folder of safetensors."""
    system: str | None = None
    """System message of the conversation."""
    temperature: float = 0.6
    """0 is greedy; above 0 samples, more at random the higher."""

    def run(self) -> None:
        from dbrx_jax.cli.chat import Conversation, converse

        model, tokenizer = _load(self.checkpoint, self)
        max_seq_len = model.config.max_seq_len

        def answer(messages: list[dict[str, str]]) -> Iterator[str]:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            options = self.generate_options(self.temperature)
            remaining = max_seq_len - len(ids)
            if remaining < 1:
                raise GenerationError(f"the conversation fills the model's {max_seq_len} tokens; /reset begins anew")
            options["max_new_tokens"] = min(self.max_new_tokens, remaining)
            options["cache_length"] = min(CHAT_CACHE_LENGTH, max_seq_len)
            rates = _Rates()
            yield from _stream(model, tokenizer, ids, rates, options)
            print_status(f"\n[{rates.summary()}]")

        converse(Conversation(self.system), answer)


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and memory."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from dbrx_jax.cli.info import collect

        facts = collect()
        if self.json:
            print(json.dumps(facts, indent=2))
            return
        for key, value in facts.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{key:<10}{line}")


@dataclasses.dataclass(frozen=True)
class _Request:
    """A prompt to complete, as text or as messages, with the fields of its line in the prompts file."""

    fields: dict[str, Any]
    prompt: str | None
    messages: list[dict[str, str]] | None

    def token_ids(self, tokenizer: "DbrxTokenizer") -> list[int]:
        if self.messages is not None:
            return tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
        return tokenizer.encode(self.prompt or "")


class _Rates:
    """Totals of tokens and seconds over several streams."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self.prefill_tokens = self.decode_tokens = 0

    def add(self, stream: "TokenStream") -> None:
        for name in self.seconds:
            self.seconds[name] += getattr(stream.timings, name)
        self.prefill_tokens += int(stream.prompt_lengths.sum())
        self.decode_tokens += int((stream.lengths - 1).sum())  # a row's first token comes out of its prefill

    def summary(self) -> str:
        prefill = self.prefill_tokens / max(self.seconds["prefill"], 1e-9)
        decode = self.decode_tokens / max(self.seconds["decode"], 1e-9)
        return (
            f"prefill {self.prefill_tokens} tokens, {prefill:.0f}/s; "
            f"decode {self.decode_tokens} tokens, {decode:.1f}/s; compiling {self.seconds['compile']:.1f} s"
        )


def _stream(
    model: "DbrxForCausalLM", tokenizer: "DbrxTokenizer", ids: list[int], rates: _Rates, options: dict[str, Any]
) -> Iterator[str]:
    """Yields the completion of one prompt in pieces of text."""
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.generation.text_stream import stream_text

    if not ids:
        raise GenerationError("the prompt is empty; give at least one character")
    stream = TokenStream(model, [ids], **options)
    stream.compile()
    yield from stream_text(stream, tokenizer, options.get("stop_strings", ()))
    rates.add(stream)


def _complete(
    model: "DbrxForCausalLM", tokenizer: "DbrxTokenizer", batch: list[_Request], rates: _Rates, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the results of a batch: fields of the request, completion, number of new tokens, finish reason."""
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.generation.text_stream import completion_text

    padded: dict[str, Any] = tokenizer.pad([request.token_ids(tokenizer) for request in batch])
    stream = TokenStream(model, **padded, burst=None, **options)
    stream.compile()
    for _ in stream:
        pass
    rates.add(stream)
    new_tokens = stream.sequences[:, padded["input_ids"].shape[1] :]
    for request, row, length, ended in zip(batch, new_tokens, stream.lengths, stream.ended, strict=True):
        yield request.fields | {
            "completion": completion_text(tokenizer, row[:length], options["stop_strings"]),
            "new_tokens": int(length),
            "finish_reason": "stop" if ended else "length",
        }


def _load(checkpoint: str | None, options: Options) -> tuple["DbrxForCausalLM", "DbrxTokenizer"]:
    """Loads a checkpoint, or else the demo, and enables the compilation cache."""
    from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
    from dbrx_jax.demo import source_folder
    from dbrx_jax.runtime import enable_compilation_cache

    enable_compilation_cache(print_status)
    path = checkpoint or source_folder()
    begin = time.perf_counter()
    tokenizer = DbrxTokenizer.from_pretrained(path, options.ranks_file)
    model = DbrxForCausalLM.from_pretrained(path, options.mesh, dtype=options.dtype, quantization=options.quantization)
    seconds = time.perf_counter() - begin
    millions = model.config.total_parameters / 1e6
    stored = str(model.dtype) if model.quantization is None else f"{model.quantization}, {model.dtype}"
    print_status(f"Loaded {path} ({millions:,.1f}M parameters, {stored}) in {seconds:.1f} s")
    return model, tokenizer


def _read_requests(path: Path) -> list[_Request]:
    """Reads JSON lines, see `Generate.file`; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{path}: cannot be read ({error})") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"{path}, line {number}: not JSON ({error})") from None
        if isinstance(data, str):
            data = {"prompt": data}
        prompt, messages = (data.get("prompt"), data.get("messages")) if isinstance(data, dict) else (None, None)
        if not (isinstance(prompt, str) and prompt) and not (isinstance(messages, list) and messages):
            raise GenerationError(f'{path}, line {number}: expected a text, {{"prompt": …}} or {{"messages": […]}}')
        requests.append(_Request(data, prompt, messages))
    if not requests:
        raise GenerationError(f"{path}: holds no prompts")
    return requests


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """Opens stdout, or a file that appears when it is complete, for JSON lines."""
    # JSON may hold half of a surrogate pair, which is written as an escape.
    escape = "backslashreplace"
    if path is None:
        sys.stdout.reconfigure(errors=escape)  # type: ignore[union-attr]
        yield sys.stdout
        return
    if path.is_dir():
        raise GenerationError(f"{path}: is a folder; name a file")
    incomplete = path.with_name(path.name + ".incomplete")
    try:
        file = incomplete.open("w", encoding="utf-8", errors=escape)
    except OSError as error:
        raise GenerationError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with file:
            yield file
    except BaseException:
        incomplete.unlink()
        raise
    incomplete.replace(path)


def main() -> None:
    """Runs the command dbrx-jax."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's log below errors
    set_process_defaults()
    command = tyro.extras.subcommand_cli_from_dict(
        {"generate": Generate, "chat": Chat, "plan": Plan, "info": Info}, prog="dbrx-jax", description="DBRX in JAX."
    )
    run("dbrx-jax", command.run)
