"""Options of generate, chat and serve."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dbrx_jax.cli.arguments import Given
from dbrx_jax.cli.generation_options import check_seed, read_options
from dbrx_jax.errors import GenerationError

CheckpointArgument = Annotated[
    tyro.conf.Positional[str | None], tyro.conf.arg(metavar="CHECKPOINT", help_behavior_hint="")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of loading a model."""

    checkpoint: CheckpointArgument = None
    """Orbax folder made by dbrx-convert, or Hugging Face folder of safetensors."""
    dtype: Given[Literal["float32", "bfloat16"]] = None
    """Cast the weights on loading; unchanged by default."""
    quantization: Given[str] = None
    """Quantise the weights on loading: int8, int4 (experts in groups of 128, the rest int8; also int4-64 and int4-32),
    fp8, or parts such as experts=int4-64,attention=int8."""
    mesh: Given[str] = None
    """Device mesh: a recipe such as v5e-64, or axes such as expert=16,tensor=4; one device by default."""
    verify: bool = False
    """Compare the weights, while they are read, with the digests of an Orbax folder."""
    ranks_file: Given[Path] = None
    """A tiktoken ranks file, for checkpoints without a vocabulary."""
    cache_dtype: Given[Literal["int8"]] = None
    """int8 halves the memory of a bfloat16 model's key-value cache."""
    batch_invariant: bool = False
    """Make each prompt's result bit-identical in batches of any size; slower, most of all for few prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedOptions(LoadOptions):
    """Options of a run of several processes."""

    distributed: bool = False
    """Run as one of several processes, each started with this command; only the first prints and writes."""
    coordinator: Given[str] = None
    """HOST:PORT of the first process. Cloud TPU, GKE and SLURM provide this and the next two options."""
    processes: Given[int] = None
    """Number of processes."""
    process_id: Given[int] = None
    """Index of this process, from 0."""

    def check_distributed(self) -> None:
        """Checks which of these options are given together."""
        if not self.distributed and (self.coordinator, self.processes, self.process_id) != (None, None, None):
            raise GenerationError("--coordinator, --processes and --process-id go with --distributed")
        if self.distributed and self.mesh is None:
            raise GenerationError("--distributed needs --mesh, to lay the model over the devices of all processes")

    @contextlib.contextmanager
    def joined(self) -> Iterator[bool]:
        """Connects this process to the others of a distributed run; yields whether it is the first."""
        if not self.distributed:
            yield True
            return
        from dbrx_jax.sharding import distributed

        with distributed.start(self.coordinator, self.processes, self.process_id) as first:
            yield first

    def check_same(self, name: str, text: str, may_differ: Sequence[str]) -> None:
        """Checks that all processes of a distributed run have the same options, but for some, and the same text.

        Args:
          name: of options and text, for the error.
        """
        if not self.distributed:
            return
        from dbrx_jax.sharding.distributed import check_same

        unset: dict[str, Any] = dict.fromkeys(("process_id", "coordinator", "checkpoint", "ranks_file", *may_differ))
        check_same(name, repr((dataclasses.replace(self, **unset), text)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LoadOptions):
    """Options of both generate and chat."""

    max_new_tokens: Given[int] = None
    """Maximum number of new tokens per prompt; the checkpoint's by default, else 256, or what fits the model."""
    min_new_tokens: Given[int] = None
    """Do not stop before so many new tokens."""
    max_time: Given[float] = None
    """Stop after so many seconds."""
    top_k: Given[int] = None
    """Sample from the k most probable tokens."""
    top_p: Given[float] = None
    """Sample from the most probable tokens that together reach this probability."""
    min_p: Given[float] = None
    """Sample from tokens at least this fraction as probable as the most probable."""
    typical_p: Given[float] = None
    """Sample from the most typical tokens that together reach this probability."""
    repetition_penalty: Given[float] = None
    """Above 1 makes tokens already in the text less probable."""
    frequency_penalty: Given[float] = None
    """Above 0 makes new tokens less probable with each time they have come."""
    presence_penalty: Given[float] = None
    """Above 0 makes new tokens that have come less probable."""
    no_repeat_ngram_size: Given[int] = None
    """Let no sequence of so many tokens come twice."""
    seed: Given[int] = None
    """Random seed; the same one gives the same text."""

    def given_options(self) -> dict[str, Any]:
        """Returns the options of generation that were given, by GenerationConfig's names, checked.

        Raises:
          GenerationError: a value is out of its range.
        """
        check_seed(self.seed, "--seed")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return read_options({name: value for name, value in values.items() if value != ()}, "--")

    def cache_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of TokenStream that are no options of generation."""
        return {"cache_dtype": self.cache_dtype, "batch_invariant": self.batch_invariant}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options, DistributedOptions):
    """Options of generate."""

    prompt: Given[str] = None
    """Prompt to complete; its completion streams to stdout."""
    file: Given[Path] = None
    """JSON lines, each a text, {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}; - is stdin. An object may
    hold any option of generation for its row, such as "max_new_tokens": 20, "temperature": 0.7, "seed": 1 or
    "stop": ["."], and other fields, which its result repeats. A row that cannot be used gets the field error, and the
    exit status is 1."""
    output: Given[Path] = None
    """File to write the results of --file to, as JSON lines in the same order; stdout, or -, by default. The file grows
    as OUTPUT.incomplete; if the command is ended before it is complete, the same command goes on behind its rows."""
    chat: bool = False
    """Apply the checkpoint's chat template to --prompt as a user message."""
    temperature: Given[float] = None
    """0 is greedy; above 0 samples, more at random the higher. The checkpoint's settings by default, else greedy."""
    stop: tuple[str, ...] = ()
    """Stop strings: each ends a completion and is cut off."""
    num_return_sequences: Given[int] = None
    """Completions of each row of --file, with the field index; give --temperature too."""
    token_ids: bool = False
    """Write each completion of --file also as token ids."""
    logprobs: bool = False
    """Write the log-probability of each token of --file's completions."""
    batch_size: int = 8
    """Number of rows of --file that are computed together."""

    def result_options(self) -> dict[str, Any]:
        """Returns the options that the results of --file depend on, as JSON values."""
        other = {"prompt", "file", "output", "chat", "mesh", "verify", "batch_size"}
        other |= {"distributed", "coordinator", "processes", "process_id"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in other}
        return json.loads(json.dumps(values, default=str))

    def check_same_on_all_processes(self, prompts: str) -> None:
        """Checks that all processes of a distributed run have the same options and prompts."""
        self.check_same("options and prompts", prompts, ("file", "output"))
