"""Loading for generate and chat: a checkpoint's small files first, which show most mistakes, then its weights."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.options import Options
from dbrx_jax.console import print_status
from dbrx_jax.errors import GenerationError

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.config import DbrxConfig
    from dbrx_jax.text.tokenizer import DbrxTokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights: the configuration, the tokenizer, and generation_config.json as it is."""

    path: str
    config: "DbrxConfig"
    tokenizer: "DbrxTokenizer"
    generation: Mapping[str, Any]

    def check_length(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Checks that a prompt and its new tokens fit the model's positions.

        Raises:
          GenerationError: they do not, or the prompt is empty.
        """
        if not num_prompt_tokens:
            raise GenerationError("the prompt is empty; give at least one character")
        available = self.config.max_seq_len - num_prompt_tokens
        if max_new_tokens > available:
            raise GenerationError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {num_prompt_tokens} tokens is beyond the model's "
                f"{self.config.max_seq_len} positions; "
                + (f"ask for at most {available}" if available > 0 else "shorten the prompt")
            )


def open_checkpoint(options: Options) -> Checkpoint:
    """Reads the small files of the checkpoint, or of the demo, and checks the options of loading.

    Raises:
      DbrxError: a file is missing or damaged, or an option is unknown.
    """
    from dbrx_jax.config import DbrxConfig
    from dbrx_jax.demo import source_folder
    from dbrx_jax.files import read_json
    from dbrx_jax.hub import checkpoint_folder
    from dbrx_jax.quantization import Quantization
    from dbrx_jax.sharding.recipes import find_axes
    from dbrx_jax.text.tokenizer import DbrxTokenizer

    Quantization.parse(options.quantization)
    if options.mesh is not None:
        find_axes(options.mesh)
    folder = checkpoint_folder(options.checkpoint or source_folder())
    config = DbrxConfig.from_file(folder)
    tokenizer = DbrxTokenizer.from_pretrained(folder, options.ranks_file)
    file = folder / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    if not isinstance(generation, Mapping):
        raise GenerationError(f"{file}: expected a JSON object")
    return Checkpoint(options.checkpoint or str(folder), config, tokenizer, generation)


def load_weights(checkpoint: Checkpoint, options: Options, rows: int, positions: int) -> "DbrxForCausalLM":
    """Loads the weights and enables the compilation cache.

    Args:
      rows: rows of a batch.
      positions: of a row's key-value cache.
    """
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.runtime import enable_compilation_cache

    _check_memory(checkpoint, options, rows, positions)
    enable_compilation_cache(print_status)
    begin = time.perf_counter()
    model = DbrxForCausalLM.from_pretrained(
        checkpoint.path, options.mesh, dtype=options.dtype, quantization=options.quantization
    )
    seconds = time.perf_counter() - begin
    millions = model.config.total_parameters / 1e6
    stored = str(model.dtype) if model.quantization is None else f"{model.quantization}, {model.dtype}"
    print_status(f"Loaded {checkpoint.path} ({millions:,.1f}M parameters, {stored}) in {seconds:.1f} s")
    return model


def _check_memory(checkpoint: Checkpoint, options: Options, rows: int, positions: int) -> None:
    """Checks that the model and the cache fit the memory of host and devices."""
