"""The options of generation: their names, checks and files."""

from dbrx_jax.generation_config.config import FILE as FILE
from dbrx_jax.generation_config.config import SAMPLING_OPTIONS as SAMPLING_OPTIONS
from dbrx_jax.generation_config.config import GenerationConfig as GenerationConfig
from dbrx_jax.generation_config.not_supported import NOT_SUPPORTED as NOT_SUPPORTED
