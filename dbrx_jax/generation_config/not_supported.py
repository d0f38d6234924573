"""Options of transformers, OpenAI and vLLM that are not supported, and what there is instead."""

from collections.abc import Mapping
from typing import Any

_BEAMS = "beam search is not implemented; do_sample with num_return_sequences gives several continuations"
_ASSISTED = "assisted generation is not implemented; plain decoding gives the same tokens"
_ENCODER = "DBRX has no encoder"
_CONTRASTIVE = "contrastive search is not implemented; use do_sample with top_k, top_p or typical_p"
_CACHE = "the cache is of one kind; cache_length and cache_dtype change it"
# By name: values that change nothing, which are taken, and what to do instead of another.
NOT_SUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "length_penalty": ((1,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "low_memory": ((False,), _BEAMS),
    "penalty_alpha": ((0,), _CONTRASTIVE),
    "dola_layers": ((), "DoLa decoding is not implemented; use repetition_penalty"),
    "guidance_scale": ((1,), "classifier-free guidance is not implemented; logits_processor takes a function"),
    "negative_prompt_ids": ((), "classifier-free guidance is not implemented; logits_processor takes a function"),
    "negative_prompt_attention_mask": ((), "classifier-free guidance is not implemented"),
    "prefix_allowed_tokens_fn": ((), "give logits_processor a JAX function that returns -inf for other tokens"),
    "watermarking_config": ((), "watermarks are not implemented; logits_processor takes a function"),
    "remove_invalid_values": ((False,), "logits that are not finite end generation with an error"),
    "token_healing": ((False,), "token healing is not implemented; end the prompt at a whole token"),
    "forced_bos_token_id": ((), _ENCODER + "; put the token at the end of the prompt"),
    "decoder_start_token_id": ((), _ENCODER + "; put the token at the beginning of the prompt"),
    "encoder_repetition_penalty": ((1,), _ENCODER + "; repetition_penalty covers the prompt"),
    "encoder_no_repeat_ngram_size": ((0,), _ENCODER + "; no_repeat_ngram_size covers the prompt"),
    "encoder_outputs": ((), _ENCODER),
    "use_cache": ((True,), "generation always uses the cache"),
    "cache_implementation": ((), _CACHE),
    "cache_config": ((), _CACHE),
    "past_key_values": ((), _CACHE),
    "return_legacy_cache": ((False,), _CACHE),
    "prefill_chunk_size": ((), "prompts always run in chunks; their lengths are chosen by the prompt's"),
    "assistant_model": ((), _ASSISTED),
    "prompt_lookup_num_tokens": ((), _ASSISTED),
    "max_matching_ngram_size": ((), _ASSISTED),
    "assistant_early_exit": ((), _ASSISTED),
    "num_assistant_tokens": ((20,), _ASSISTED),
    "num_assistant_tokens_schedule": (("constant",), _ASSISTED),
    "assistant_confidence_threshold": ((0.4,), _ASSISTED),
    "assistant_lookbehind": ((10,), _ASSISTED),
    "target_lookbehind": ((10,), _ASSISTED),
    "assistant_tokenizer": ((), _ASSISTED),
    "is_assistant": ((False,), _ASSISTED),
    "compile_config": ((), "generation is always compiled"),
    "disable_compile": ((False,), "generation is always compiled"),
    "output_attentions": ((False,), "attention is computed in blocks and never stored"),
    "output_hidden_states": ((False,), "call model(ids, output_hidden_states=True) with the result's sequences"),
    "synced_gpus": ((False,), "all processes of a mesh always run in step"),
    "use_model_defaults": ((), "a generation_config replaces the checkpoint's, but for its token ids"),
    "custom_generate": ((), "code from the hub is never run"),
    "inputs_embeds": ((), "prompts are token ids: input_ids"),
    "inputs": ((), "the prompts' name is input_ids"),
    "position_ids": ((), "positions follow from attention_mask"),
    "token_type_ids": ((), "DBRX has no token types"),
    "best_of": ((1,), "use num_return_sequences with output_logprobs"),
    "n": ((1,), "its name here is num_return_sequences"),
    "max_tokens": ((), "its name here is max_new_tokens"),
    "min_tokens": ((), "its name here is min_new_tokens"),
    "stop": ((), "its name here is stop_strings"),
    "stop_token_ids": ((), "its name here is eos_token_id"),
    "logprobs": ((), "its name here is output_logprobs"),
    "trust_remote_code": ((False,), "code from the hub is never run"),
}


def is_neutral(name: str, value: Any) -> bool:
    """Returns whether a value of an option that is not supported changes nothing in transformers."""
    return value is None or any(type(value) in (type(v), float) and value == v for v in NOT_SUPPORTED[name][0])
