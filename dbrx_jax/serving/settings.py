"""Settings of the server."""

import dataclasses

from dbrx_jax.generation_config import GenerationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server: the model it names, who may ask, and the bounds of a request.

    Attributes:
      model_name: of the model, in requests and answers.
      max_model_len: tokens of a prompt and its completion.
      vocab_size: ids that a prompt may have.
      cache_blocks, cache_block: blocks of the engine's cache, and positions of one. A completion without a number of
        tokens takes no more than its request has there.
      defaults: the checkpoint's options of generation; a request's are put over them.
      api_keys: every route but /health and the page needs one of them; without keys all may ask.
      hosts: names by which requests may call the server (their Host); () allows all.
      allow_origins: web pages of these origins may read answers; "*" is every page.
      timeout: seconds for a request, from its first byte to its last token; None is no limit.
      retry_after: seconds after which a client that was refused for load may try again.
      max_body_bytes, max_prompts, max_messages, max_n, max_stop, max_logit_bias, max_top_logprobs: bounds of a request.
      body_seconds: for reading a request's body.
      num_workers: threads that tokenise and render chat templates.
      max_preparing: requests that these threads have or wait for them.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    cache_blocks: int
    cache_block: int = 128
    defaults: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    timeout: float | None = 600.0
    retry_after: int = 2
    max_body_bytes: int = 4 << 20
    max_prompts: int = 128
    max_messages: int = 2048
    max_n: int = 32
    max_stop: int = 16
    max_logit_bias: int = 1024
    max_top_logprobs: int = 20
    body_seconds: float = 60.0
    num_workers: int = 4
    max_preparing: int = 256
