"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them; evaluation harnesses ask for them."""

from typing import Any

from dbrx_jax.serving import options
from dbrx_jax.serving.answer import check_model
from dbrx_jax.serving.errors import bad_request
from dbrx_jax.serving.protocol import DetokenizeBody, TokenizeBody
from dbrx_jax.serving.state import State


async def tokenize(state: State, body: TokenizeBody) -> dict[str, Any]:
    """Returns the token ids of a prompt or of a conversation."""
    check_model(body.model, state.settings)
    return await state.workers.run(_tokenize, state, body)


def _tokenize(state: State, body: TokenizeBody) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        flags = options.template_options(body.add_generation_prompt, body.continue_final_message)
        ids = state.prompts.messages(body.messages, *flags)
    else:
        assert body.prompt is not None
        # A special token alone is asked for to learn its id; anywhere else it is text.
        special = state.tokenizer.special_tokens.get(body.prompt)
        ids = state.prompts.text(body.prompt, "prompt") if special is None else [special]
    strings = state.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": state.settings.max_model_len, "tokens": ids, "token_strs": strings}


async def detokenize(state: State, body: DetokenizeBody) -> dict[str, Any]:
    """Returns the text of token ids, special tokens too."""
    check_model(body.model, state.settings)
    return await state.workers.run(_detokenize, state, body)


def _detokenize(state: State, body: DetokenizeBody) -> dict[str, Any]:
    state.prompts.check_ids(body.tokens, "tokens")
    return {"prompt": state.tokenizer.decode(body.tokens)}


def tokenizer_info(state: State) -> dict[str, Any]:
    """Returns the tokenizer's special tokens and its chat template, as tokenizer_config.json has them."""
    tokenizer = state.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": state.settings.max_model_len,
        "add_bos_token": False,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
    }
