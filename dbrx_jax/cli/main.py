"""dbrx-jax: generate, chat, plan and info on the command line."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dbrx_jax.cli.plan import Plan
from dbrx_jax.console import print_status, run
from dbrx_jax.errors import GenerationError
from dbrx_jax.runtime import set_process_defaults

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.generation.generate import TokenStream
    from dbrx_jax.text.tokenizer import DbrxTokenizer

# A conversation's cache is made this long at once (or the model's length), not a little longer each turn.
CHAT_CACHE = 4096  # positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that generate and chat share."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Cast the weights on loading; by default they stay as they are."""
    quantization: str | None = None
    """Quantise the weights on loading: int8, int4 (experts in groups of 128, the rest int8; also int4-64 and int4-32),
    fp8, or parts such as experts=int4-64,attention=int8."""
    mesh: str | None = None
    """Devices to lay the model over: a recipe such as v5e-64, or axes such as expert=16,tensor=4; by default one."""
    ranks_file: Path | None = None
    """A tiktoken ranks file, for checkpoints that hold no vocabulary."""
    max_new_tokens: int = 256
    """The most tokens to add to a prompt."""
    top_k: int | None = None
    """Draw among the k most probable tokens."""
    top_p: float | None = None
    """Draw among the most probable tokens that together reach this probability."""
    min_p: float | None = None
    """Draw among tokens at least this fraction as probable as the most probable."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there before less probable."""
    seed: int | None = None
    """Random seed; the same one gives the same text."""
    cache_dtype: Literal["int8"] | None = None
    """int8 halves the memory of a bfloat16 model's key-value cache."""
    batch_invariant: bool = False
    """Give each prompt the same text and numbers, to the bit, whichever others run beside it; slower, most for few."""

    def of_generate(self, temperature: float) -> dict[str, Any]:
        """The keyword arguments of generate; a temperature of 0 takes the most probable token."""
        names = ("max_new_tokens", "repetition_penalty", "seed", "cache_dtype", "batch_invariant")
        result = {name: getattr(self, name) for name in names}
        if temperature == 0:
            if any(getattr(self, name) is not None for name in ("top_k", "top_p", "min_p")):
                raise GenerationError(
                    "--top-k, --top-p and --min-p draw at random; give --temperature above 0 with them"
                )
            return result
        filters = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        return {**result, **filters, "do_sample": True, "temperature": temperature}


@dataclasses.dataclass(frozen=True)
class Generate(Options):
    """Continue a prompt, or a file of prompts. Without CHECKPOINT the demo that comes along is used."""

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Orbax folder made by dbrx-convert, or Hugging Face folder of safetensors."""
    prompt: str | None = None
    """Text to continue; its continuation streams to stdout."""
    file: Path | None = None
    """JSON lines, each a text, {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}."""
    output: Path | None = None
    """File to write the completions of --file to, as JSON lines; stdout by default."""
    chat: bool = False
    """Put --prompt into the checkpoint's chat template, as a user's message."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0 draws, the more at random the higher."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are cut off."""
    batch_size: int = 8
    """Prompts of --file that run together."""
    distributed: bool = False
    """Run as one of several processes, each started with this command; the first alone prints and writes."""
    coordinator: str | None = None
    """HOST:PORT of the first process; JAX finds it, and the next two, on Cloud TPU, GKE and SLURM."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """This process' number, from 0."""

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
            self._generate(self._jobs(), self.output)
            return
        if self.mesh is None:
            raise GenerationError("--distributed needs --mesh, to lay the model over the devices of all processes")
        from dbrx_jax.sharding import distributed

        with distributed.start(self.coordinator, self.processes, self.process_id) as first:
            jobs = self._jobs()
            own: dict[str, Any] = dict.fromkeys(
                ("process_id", "coordinator", "checkpoint", "ranks_file", "file", "output")
            )
            distributed.check_same("options and prompts", repr((dataclasses.replace(self, **own), jobs)))
            self._generate(jobs, self.output if first else None)

    def _jobs(self) -> list["_Job"]:
        return _read_jobs(self.file) if self.file else [_Job({"prompt": self.prompt}, self.prompt, None)]

    def _generate(self, jobs: list["_Job"], output: Path | None) -> None:
        model, tokenizer = _load(self.checkpoint, self)
        options = self.of_generate(self.temperature) | {"stop_strings": self.stop, "tokenizer": tokenizer}
        if self.prompt is not None:
            ids = (
                tokenizer.apply_chat_template(_user(self.prompt), True) if self.chat else tokenizer.encode(self.prompt)
            )
            rates = _Rates()
            for text in _stream(model, tokenizer, ids, self.stop, rates, options):
                print(text, end="", flush=True)
            print()
            print_status(rates.line())
            return
        for number, job in enumerate(jobs, 1):
            room = model.config.max_seq_len - len(job.ids(tokenizer))
            if room < self.max_new_tokens:
                raise GenerationError(
                    f"{self.file}, prompt {number}: with {self.max_new_tokens} new tokens it is "
                    f"{self.max_new_tokens - room} over the model's {model.config.max_seq_len}; shorten it"
                )
        with _Results(output) as out:
            rates = _Rates()
            for start in range(0, len(jobs), self.batch_size):
                for result in _batch(
                    model, tokenizer, jobs[start : start + self.batch_size], self.stop, rates, options
                ):
                    print(json.dumps(result, ensure_ascii=False), file=out, flush=True)
                if len(jobs) > self.batch_size:
                    print_status(f"{min(start + self.batch_size, len(jobs))} of {len(jobs)} prompts")
            print_status(rates.line())


@dataclasses.dataclass(frozen=True)
class Chat(Options):
    """Talk with a checkpoint. Without CHECKPOINT the demo that comes along is used."""

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Orbax folder made by dbrx-convert, or Hugging Face folder of safetensors."""
    system: str | None = None
    """System message to begin with."""
    temperature: float = 0.6
    """0 takes the most probable token; above 0 draws, the more at random the higher."""

    def run(self) -> None:
        from dbrx_jax.cli.chat import Conversation, converse

        model, tokenizer = _load(self.checkpoint, self)
        length = min(CHAT_CACHE, model.config.max_seq_len)

        def answer(messages: list[dict[str, str]]) -> Iterator[str]:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            options = self.of_generate(self.temperature)
            room = model.config.max_seq_len - len(ids)
            if room < 1:
                raise GenerationError(
                    f"the conversation fills the model's {model.config.max_seq_len} tokens; /reset begins anew"
                )
            options |= {"max_new_tokens": min(self.max_new_tokens, room), "cache_length": length}
            rates = _Rates()
            yield from _stream(model, tokenizer, ids, (), rates, options)
            print_status(f"\n[{rates.line()}]")

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
class _Job:
    """A line of a prompts file: what it said, and the prompt as text or as messages."""

    given: dict[str, Any]
    prompt: str | None
    messages: list[dict[str, str]] | None

    def ids(self, tokenizer: "DbrxTokenizer") -> list[int]:
        if self.messages is not None:
            return tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
        return tokenizer.encode(self.prompt or "")


class _Rates:
    """Adds up what streams took."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self.prefill_tokens = self.decode_tokens = 0

    def add(self, stream: "TokenStream") -> None:
        for name in self.seconds:
            self.seconds[name] += getattr(stream.timings, name)
        self.prefill_tokens += int(stream.prompt_lengths.sum())
        self.decode_tokens += int((stream.lengths - 1).sum())  # a row's first token comes out of its prefill

    def line(self) -> str:
        prefill = self.prefill_tokens / max(self.seconds["prefill"], 1e-9)
        decode = self.decode_tokens / max(self.seconds["decode"], 1e-9)
        return (
            f"prefill {self.prefill_tokens} tokens, {prefill:.0f}/s; "
            f"decode {self.decode_tokens} tokens, {decode:.1f}/s; compiling {self.seconds['compile']:.1f} s"
        )


def _stream(model, tokenizer, ids, stop, rates, options) -> Iterator[str]:
    """The text that follows one prompt, as it comes."""
    from dbrx_jax.generation.generate import TokenStream
    from dbrx_jax.generation.text_stream import stream_text

    if not ids:
        raise GenerationError("the prompt is empty; give at least one character")
    stream = TokenStream(model, [ids], **options)
    stream.compile()
    yield from stream_text(stream, tokenizer, stop)
    rates.add(stream)


def _batch(model, tokenizer, jobs, stop, rates, options) -> Iterator[dict[str, Any]]:
    """Completions of jobs that run together, in their order."""
    from dbrx_jax.generation.generate import TokenStream
    from dbrx_jax.generation.text_stream import completion_text

    padded = tokenizer.pad([job.ids(tokenizer) for job in jobs])
    stream = TokenStream(model, **padded, burst=None, **options)
    stream.compile()
    for _ in stream:
        pass
    rates.add(stream)
    new = stream.sequences[:, padded["input_ids"].shape[1] :]
    for job, row, length, ended in zip(jobs, new, stream.lengths, stream.ended, strict=True):
        text = completion_text(tokenizer, row[:length], stop)
        yield job.given | {
            "completion": text,
            "new_tokens": int(length),
            "finish_reason": "stop" if ended else "length",
        }


def _load(checkpoint: str | None, options: Options) -> tuple["DbrxForCausalLM", "DbrxTokenizer"]:
    from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
    from dbrx_jax.demo import source_folder
    from dbrx_jax.runtime import enable_compilation_cache

    enable_compilation_cache(print_status)
    folder = checkpoint or source_folder()
    begin = time.perf_counter()
    tokenizer = DbrxTokenizer.from_pretrained(folder, options.ranks_file)
    model = DbrxForCausalLM.from_pretrained(
        folder, options.mesh, dtype=options.dtype, quantization=options.quantization
    )
    millions = model.config.total_parameters / 1e6
    stored = str(model.dtype) if model.quantization is None else f"{model.quantization}, {model.dtype}"
    print_status(f"Loaded {folder} ({millions:,.1f}M parameters, {stored}) in {time.perf_counter() - begin:.1f} s")
    return model, tokenizer


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _read_jobs(path: Path) -> list[_Job]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{path}: cannot be read ({error})") from None
    jobs = []
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
        jobs.append(_Job(data, prompt, messages))
    if not jobs:
        raise GenerationError(f"{path}: holds no prompts")
    return jobs


class _Results:
    """Writes completions to stdout, or to a file that appears when it is complete."""

    def __init__(self, path: Path | None):
        self.path = path

    def __enter__(self) -> Any:
        if self.path is None:
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            return sys.stdout
        if self.path.is_dir():
            raise GenerationError(f"{self.path}: is a folder; name a file")
        self.aside = self.path.with_name(self.path.name + ".incomplete")
        try:
            # Half of a surrogate pair, which JSON may hold, is written as JSON escapes it.
            self.file = self.aside.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise GenerationError(f"{self.path}: cannot be written ({error.strerror})") from None
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.path is None:
            return
        self.file.close()
        if kind is None:
            self.aside.replace(self.path)
        else:
            self.aside.unlink()


def main() -> None:
    """The command dbrx-jax."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the machine are not the user's concern
    set_process_defaults()
    command = tyro.extras.subcommand_cli_from_dict(
        {"generate": Generate, "chat": Chat, "plan": Plan, "info": Info}, prog="dbrx-jax", description="DBRX in JAX."
    )
    run("dbrx-jax", command.run)
