"""The command dbrx-jax generate: completes a prompt, or a file of prompts."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_jax.cli.batch import complete_file
from dbrx_jax.cli.load import load_weights, open_checkpoint
from dbrx_jax.cli.options import GenerateOptions, Options
from dbrx_jax.cli.rates import Rates
from dbrx_jax.console import print_status
from dbrx_jax.errors import GenerationError

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.generation_config import GenerationConfig
    from dbrx_jax.text.tokenizer import DbrxTokenizer


@dataclasses.dataclass(frozen=True)
class Generate(GenerateOptions):
    """Complete a prompt or a file of prompts.

    Without CHECKPOINT the included demo is used.
    """

    def run(self) -> None:
        self._check()
        with self.joined() as first:
            complete = self._complete(first)
        if not complete:
            sys.stdout.flush()
            sys.exit(1)

    def _complete(self, first: bool) -> bool:
        if self.file is None:
            complete_prompt(self)
            return True
        return complete_file(self, first)

    def _check(self) -> None:
        """Checks which options are given together."""
        if self.prompt is None and self.file is None and self.checkpoint and not _may_be_checkpoint(self.checkpoint):
            quoted = json.dumps(self.checkpoint, ensure_ascii=False)
            raise GenerationError(
                f"{self.checkpoint}: there is no such folder, which the argument CHECKPOINT names; "
                f"did you mean --prompt {quoted}?"
            )
        if (self.prompt is None) == (self.file is None):
            raise GenerationError("generate: give either --prompt TEXT or --file PROMPTS.jsonl")
        for name in ("output", "num_return_sequences", "token_ids", "logprobs"):
            if self.prompt is not None and getattr(self, name):
                raise GenerationError(f"--{name.replace('_', '-')} goes with --file; --prompt prints its completion")
        if self.chat and self.file is not None:
            raise GenerationError('--chat goes with --prompt; rows of --file with "messages" are chats')
        if self.batch_size < 1:
            raise GenerationError(f"--batch-size: expected a whole number above 0, got {self.batch_size}")
        self.given_options()
        self.check_distributed()
        if self.distributed and self.file == Path("-"):
            raise GenerationError("--distributed needs a file that every process can read, and --file - is stdin")


def complete_prompt(command: GenerateOptions) -> None:
    """Completes --prompt on stdout, with the prompt dimly before it on a terminal."""
    checkpoint, prompt = open_checkpoint(command), command.prompt or ""
    if command.chat:
        ids = checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
    else:
        ids = checkpoint.tokenizer.encode(prompt)
    config = checkpoint.options(len(ids), command.given_options()).replace({"num_return_sequences": None})
    command.check_same_on_all_processes(prompt)
    model = load_weights(checkpoint, command, 1, len(ids) + (config.max_new_tokens or 0))
    rates = Rates()
    for number, text in enumerate(stream_completion(command, model, checkpoint.tokenizer, ids, config, rates)):
        if number == 0 and _shows_colours():
            shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in prompt)
            print(f"\x1b[2m{shown}\x1b[0m", end="\n" if command.chat else "")
        print(text, end="", flush=True)
    print()
    print_status(rates.summary())


def stream_completion(
    command: Options,
    model: "DbrxForCausalLM",
    tokenizer: "DbrxTokenizer",
    ids: list[int],
    config: "GenerationConfig",
    rates: Rates,
    cache_length: int | None = None,
) -> Iterator[str]:
    """Yields the completion of one prompt in pieces of text.

    Args:
      rates: the stream is added at its end.
      cache_length: as in TokenStream.
    """
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.generation.text_stream import stream_text
    from dbrx_jax.planning.memory_check import generation_request, report_generation_memory

    stream = TokenStream(
        model,
        [ids],
        generation_config=config,
        tokenizer=tokenizer,
        seed=command.seed,
        cache_length=cache_length,
        **command.cache_arguments(),
    )
    with report_generation_memory(generation_request(model, stream)):
        yield from stream_text(stream, tokenizer, config.stop_strings)
    rates.add(stream, 1)


def _may_be_checkpoint(path: str) -> bool:
    return "://" in path or Path(path).exists()


def _shows_colours() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
