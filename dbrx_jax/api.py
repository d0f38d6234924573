"""DbrxForCausalLM: the public model class, which loads checkpoints, computes logits and generates."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int

from dbrx_jax.checkpoint.parameters import model_from_parameters
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import GenerationError
from dbrx_jax.files import read_json
from dbrx_jax.generation.checkpoint_config import read_generation_config
from dbrx_jax.generation.generate import GenerationOutput, run_to_end
from dbrx_jax.generation.stream import BURST, TokenStream
from dbrx_jax.generation_config import FILE, GenerationConfig
from dbrx_jax.hub import checkpoint_folder, download_weights, is_on_hub
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.forward import CausalLMOutput, forward
from dbrx_jax.model.graph import split_model
from dbrx_jax.model.inputs import check_ids, pad_rows, same_shape
from dbrx_jax.planning.memory_check import check_memory, generation_request, report_generation_memory
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import BATCH_AXES


class DbrxForCausalLM(CausalLM):
    """DBRX with its language-model head, loading of checkpoints, and generation."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        mesh: Mesh | str | None = None,
        *,
        dtype: DTypeLike | None = None,
        quantization: str | Quantization | None = None,
        all_to_all: bool = False,
        attention_implementation: str | None = None,
        progress: bool | None = None,
        verify: bool = False,
        **unknown: Any,
    ) -> Self:
        """Loads an Orbax checkpoint that dbrx-convert wrote, or a Hugging Face folder of safetensors.

        Each shard is read directly to its device.

        Args:
          path: a local folder, a URL such as gs://bucket/folder (extra [gcs]), or `hf://owner/name` on the
            Hugging Face hub (extra [hub]), whose weights are downloaded once options and small files are checked.
          mesh: the devices of the model: a jax Mesh, the name of a recipe such as "v5e-64", or axes such
            as "expert=16,tensor=4" over all devices; None is one device.
          dtype: of the weights; None keeps that of the checkpoint. For quantised weights, the dtype of their
            scales and of the activations: bfloat16 or float32.
          quantization: quantises the weights while they are read: "int8", "int4" (experts in groups of 128, the
            rest int8; also "int4-32", "int4-64"), "fp8", or parts such as "experts=int4-64,attention=int8". None
            keeps the checkpoint's.
          all_to_all: in prefill and training, send tokens only to their experts' devices rather than to all
            (`jax.lax.ragged_all_to_all`, on TPU and GPU; a CPU gathers all tokens and selects).
          attention_implementation: "flash", kernels for TPUs and Hopper GPUs; "xla", blocks in plain XLA; "reference",
            the definition with all scores at once, for tests. None is "flash" where there are kernels, else "xla".
          progress: show a bar on stderr once loading has taken two seconds. None shows it on a terminal, in a
            notebook and in the commands. Of several processes only the first shows one.
          verify: compare the weights, while they are read, with the digests of an Orbax checkpoint.
          unknown: none; the error names what to use in place of an argument of transformers'.

        Raises:
          CheckpointError: the folder is not a complete DBRX checkpoint, or `verify` finds bytes that are not what was
            written; the message says what is wrong.
          ConfigError: config.json is missing, that or generation_config.json has an unusable value, or the
            implementation of attention is unknown or does not run on the devices.
          TokenizerError: tokenizer_config.json, which may name the end token, is damaged.
          MeshError: the mesh does not fit the model or the devices.
          QuantizationError: the quantisation is unknown, or does not fit the model.
          MemoryLimitError: the memory of the host or of a device ran out.
        """
        from dbrx_jax.checkpoint.keywords import refuse_keywords
        from dbrx_jax.checkpoint.load import load_model, plan_arrays  # imports safetensors
        from dbrx_jax.checkpoint.open import open_folder, require_digests, stored_quantization

        refuse_keywords(unknown)
        folder = checkpoint_folder(path, progress)
        if is_on_hub(path):  # what is wrong with the options or the small files shows before the download
            if verify:
                require_digests(folder)
            config, stored = DbrxConfig.from_file(folder), stored_quantization(folder)
            planned = (config.dtype if dtype is None else dtype, stored or quantization, attention_implementation)
            plan_arrays(config, mesh, *planned)
            read_generation_config(folder)
            download_weights(path, folder, progress)
        checkpoint = open_folder(folder, verify)
        generation_config = read_generation_config(folder)  # a mistake in it shows before the weights are read
        model = load_model(cls, checkpoint, mesh, dtype, quantization, all_to_all, attention_implementation, progress)
        model.generation_config = generation_config
        model.checkpoint_path = folder
        return model

    def save_pretrained(self, path: str | Path, format: str = "orbax", *, progress: bool | None = None) -> None:
        """Writes the model to a folder that :meth:`from_pretrained` loads; all processes of a run must call it.

        Reads the weights a block of rows at a time from the shards of each array. Process 0 writes them, with
        config.json, generation_config.json, and the tokenizer's files of the checkpoint that the model was loaded
        from, if they are still there. The folder appears when it is complete.

        Args:
          path: a folder that does not exist yet, or a URL such as gs://bucket/folder.
          format: "orbax", which keeps quantised weights as they are; or "hf", safetensors in the published layout,
            which transformers reads, of dequantised weights.
          progress: show a bar, as in :meth:`from_pretrained`.

        Raises:
          CheckpointError: the format is unknown, the folder exists, a file of the tokenizer is a link out of its
            folder, or the disk is too small or fails.
        """
        from dbrx_jax.checkpoint.save import save_model  # imports safetensors
        from dbrx_jax.text.tokenizer_files import tokenizer_files

        source = self.checkpoint_path if self.checkpoint_path and self.checkpoint_path.is_dir() else None
        settings = _generation_settings(source, self.generation_config)
        files = tokenizer_files(source) if source else ()
        save_model(self, path, format, source, files, settings, progress)

    def num_parameters(self) -> int:
        """Returns the number of weights, whether they are quantised or not."""
        return self.config.total_parameters

    @classmethod
    def from_parameters(
        cls,
        config: DbrxConfig,
        parameters: Mapping[str, Any],
        mesh: Mesh | None = None,
        quantization: Quantization | None = None,
        **options: Any,
    ) -> Self:
        """Creates a model from arrays by the names of :func:`dbrx_jax.checkpoint.parameters.parameter_specs`.

        Args:
          parameters: arrays, or QuantizedArrays for the parts that `quantization` names.
          mesh, options: as in :class:`CausalLM`.
        """
        return model_from_parameters(cls, config, parameters, mesh, quantization, **options)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        position_ids: Int[ArrayLike, "B T"] | None = None,
        output_hidden_states: bool = False,
        output_router_probs: bool = False,
    ) -> Float[Array, "B T V"] | CausalLMOutput:
        """Computes the logits (B, T, V), float32, of every position.

        Args:
          input_ids: token ids; lists of unequal length are padded on the right.
          attention_mask: 1 for tokens, 0 for padding on the left or right, where logits are undefined.
          position_ids: by default the number of tokens before, without padding.
          output_hidden_states: return a :class:`CausalLMOutput` with hidden states.
          output_router_probs: return a :class:`CausalLMOutput` with router probabilities.

        Raises:
          GenerationError: the arrays' shapes do not fit each other, or an id is outside the vocabulary.
        """
        input_ids, attention_mask = pad_rows(input_ids, attention_mask, 0, left=False)
        ids = check_ids(input_ids, self.config.vocab_size)
        mask: Any = np.ones(ids.shape, bool)
        if attention_mask is not None:
            mask = same_shape("attention_mask", attention_mask, ids) != 0
        if position_ids is None:
            xp = _numpy_of(mask)
            positions = xp.maximum(xp.cumsum(mask, axis=1) - 1, 0)
        else:
            positions = same_shape("position_ids", position_ids, ids)
        B, T = ids.shape
        padding = ((0, -B % self.partition.size(*BATCH_AXES)), (0, -T % self.partition.size("expert")))
        if padding != ((0, 0), (0, 0)):
            ids, mask, positions = (_numpy_of(a).pad(a, padding) for a in (ids, mask, positions))
        out = forward(split_model(self), ids, mask, positions, output_hidden_states, output_router_probs)
        if self.partition.mesh is not None:
            out = out._replace(
                logits=out.logits[:B, :T, : self.config.vocab_size],
                hidden_states=[x[:B, :T] for x in out.hidden_states or ()] or None,
                router_probs=[x[:B, :T] for x in out.router_probs or ()] or None,
            )
        return out if output_hidden_states or output_router_probs else out.logits

    def generate(
        self,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]] | None = None,
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        streamer: Any = None,
        **options: Any,
    ) -> np.ndarray | GenerationOutput:
        """Continues each prompt and returns the prompts as given with their new tokens: (B, T + N).

        N is the number of steps until the last row ended, at most max_new_tokens. A row keeps the token
        that ended it and is padded with the pad token after it. Prompts of unequal length are padded on the left.

        Args:
          input_ids, attention_mask: as in :class:`dbrx_jax.generation.stream.TokenStream`.
          streamer: a function that is called with new tokens (B, n) as they are generated, or an object with
            the methods put and end of transformers' streamers.
          **options: those of TokenStream but `burst`; docs/generation.md describes all. With return_dict_in_generate
            the result is an object with sequences, and with logprobs, scores and logits as requested.

        Raises:
          GenerationError: the arguments do not fit each other or the model.
          MemoryLimitError: the memory of the host or of a device is too small; the message says what would fit.
        """
        if "burst" in options:
            raise GenerationError("burst: an option of TokenStream; generate takes streamer")
        if input_ids is None:
            GenerationConfig().replace(options)  # the prompts may have another name, such as inputs
            raise GenerationError("input_ids: there are no prompts; give arrays or lists of token ids")
        if not (streamer is None or callable(streamer) or hasattr(streamer, "put")):
            raise GenerationError(f"streamer: expected a function, or an object with put and end, got {streamer!r:.40}")
        burst = None if streamer is None else BURST
        stream = TokenStream(self, input_ids, attention_mask, burst=burst, **options)
        request = generation_request(self, stream)
        check_memory(request, weights_loaded=True)
        with report_generation_memory(request):
            return run_to_end(stream, streamer)


def _numpy_of(array: Any) -> Any:
    """Returns the module with the functions of an array: numpy, or jax.numpy inside jit."""
    return np if isinstance(array, np.ndarray) else jnp


def _generation_settings(source: Path | None, config: GenerationConfig) -> dict[str, Any]:
    """Returns the contents of generation_config.json: the model's options, and its source's entries of other names."""
    file = source / FILE if source else None
    entries = read_json(file) if file and file.exists() else {}
    options = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in entries.items() if name not in options} | config.to_dict()
