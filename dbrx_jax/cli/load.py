"""Loading for the commands: a checkpoint's small files first, which show most mistakes, then its weights."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.generation_options import OUTPUTS, as_typed, merge
from dbrx_jax.cli.options import LoadOptions
from dbrx_jax.console import print_status
from dbrx_jax.errors import GenerationError

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.config import DbrxConfig
    from dbrx_jax.generation_config import GenerationConfig
    from dbrx_jax.text.tokenizer import DbrxTokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights: the configuration, the tokenizer, and its own options of generation."""

    name: str  # for people
    folder: Path
    config: "DbrxConfig"
    tokenizer: "DbrxTokenizer"
    generation: "GenerationConfig"

    def options(
        self, num_prompt_tokens: int, command: Mapping[str, Any], row: Mapping[str, Any] | None = None
    ) -> "GenerationConfig":
        """Returns the options of a prompt: the checkpoint's, the command's over them, and the row's over these.

        Raises:
          GenerationError: they do not fit each other, the prompt or the model; it names them as the user typed them.
        """
        row = row or {}
        config = merge(self.generation, command, row)
        try:
            return self.with_limits(config, num_prompt_tokens, {**command, **row})
        except GenerationError as error:
            raise as_typed(error, command, row) from None

    def with_limits(
        self, config: "GenerationConfig", num_prompt_tokens: int, given: Mapping[str, Any]
    ) -> "GenerationConfig":
        """Returns the options with numbers of new tokens for this prompt in place of lengths and defaults.

        Args:
          given: options that the user gave: what does not fit the model is an error if it is given, else cut.

        Raises:
          GenerationError: prompt and new tokens do not fit the model, or the prompt is empty.
        """
        from dbrx_jax.generation.prompts import new_token_limit

        if not num_prompt_tokens:
            raise GenerationError("the prompt is empty; give at least one character")
        try:
            limit = new_token_limit(config, given, num_prompt_tokens, num_prompt_tokens, self.config.max_seq_len)
        except GenerationError as error:
            raise GenerationError(str(error).removeprefix("input_ids: ")) from None
        limits = {"max_new_tokens": limit}
        if config.min_length:
            limits["min_new_tokens"] = max(config.min_new_tokens or 0, config.min_length - num_prompt_tokens)
        return config.replace(limits)


def open_checkpoint(options: LoadOptions) -> Checkpoint:
    """Reads the small files of the checkpoint, or of the demo, and checks the options of loading.

    Raises:
      DbrxError: a file is missing or damaged, or an option is unknown.
    """
    from dbrx_jax.checkpoint.open import require_digests
    from dbrx_jax.config import DbrxConfig
    from dbrx_jax.demo import source_folder
    from dbrx_jax.generation.checkpoint_config import read_generation_config
    from dbrx_jax.hub import checkpoint_folder
    from dbrx_jax.quantization import Quantization
    from dbrx_jax.sharding.recipes import find_axes
    from dbrx_jax.text.tokenizer import DbrxTokenizer

    Quantization.parse(options.quantization)
    if options.mesh is not None:
        find_axes(options.mesh)
    folder = checkpoint_folder(options.checkpoint or source_folder())
    config = DbrxConfig.from_file(folder)
    if options.verify:
        require_digests(folder)
    tokenizer = DbrxTokenizer.from_pretrained(folder, options.ranks_file)
    generation = read_generation_config(folder).replace(dict.fromkeys(OUTPUTS))
    return Checkpoint(options.checkpoint or "the demo", folder, config, tokenizer, generation)


def load_weights(checkpoint: Checkpoint, options: LoadOptions, rows: int, positions: int) -> "DbrxForCausalLM":
    """Loads the weights, downloaded if necessary, and enables the compilation cache.

    The memory check takes the dtype of the stored weights. Before a download only config.json says one: it is checked
    with that, and again with the weights' own, which seldom differs.

    Args:
      rows: rows of a batch; 0 checks the memory for the weights alone.
      positions: of a row's key-value cache.

    Raises:
      MemoryLimitError: the weights and the cache do not fit the memory.
      DbrxError: as :meth:`DbrxForCausalLM.from_pretrained`.
    """
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.checkpoint.open import open_folder, stored_quantization
    from dbrx_jax.hub import download_weights, is_on_hub
    from dbrx_jax.planning.memory_check import Request, check_memory
    from dbrx_jax.runtime import enable_compilation_cache
    from dbrx_jax.sharding.partition import check_mesh
    from dbrx_jax.sharding.recipes import find_mesh

    mesh = None if options.mesh is None else find_mesh(options.mesh)
    if mesh is not None:
        check_mesh(checkpoint.config, mesh)
    quantization = stored_quantization(checkpoint.folder) or options.quantization
    need = Request(checkpoint.config, mesh, options.dtype, quantization, rows, positions, options.cache_dtype)
    if is_on_hub(checkpoint.name):
        check_memory(need)
        download_weights(checkpoint.name, checkpoint.folder)
    stored_dtype = open_folder(checkpoint.folder).dtype()
    check_memory(dataclasses.replace(need, dtype=options.dtype or stored_dtype))
    enable_compilation_cache()
    begin = time.perf_counter()
    model = DbrxForCausalLM.from_pretrained(
        checkpoint.folder, mesh, dtype=options.dtype, quantization=options.quantization, verify=options.verify
    )
    seconds = time.perf_counter() - begin
    millions = model.config.total_parameters / 1e6
    stored = str(model.dtype) if model.quantization is None else f"{model.quantization}, {model.dtype}"
    print_status(f"Loaded {checkpoint.name} ({millions:,.1f}M parameters, {stored}) in {seconds:.1f} s")
    return model
