"""Errors in the user's input. The commands print each as one line and exit with 2."""

# Packages of the extras that errors ask for.
PACKAGES = {
    "compile": "'jax[tpu]' jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm",
    "gcs": "universal_pathlib gcsfs",
    "hub": "huggingface_hub",
    "serve": "fastapi uvicorn pydantic prometheus-client llguidance",
}


class DbrxError(ValueError):
    """Base class of errors in the user's input; the message says what is wrong, where, and what to do."""


def install_advice(extra: str) -> str:
    """Returns how to install the packages of an extra, without an index that has dbrx-jax itself."""
    return f"pip install '.[{extra}]' in a clone of dbrx_jax, or pip install {PACKAGES[extra]}"


class ConfigError(DbrxError):
    """A configuration is missing or damaged, or has an unusable value."""


class CheckpointError(DbrxError):
    """A checkpoint is missing, damaged or incomplete, or does not fit its configuration."""


class TokenizerError(DbrxError):
    """A tokenizer's files are missing or damaged, or a chat template failed."""


class GenerationError(DbrxError):
    """Arguments of generate do not fit each other or the model."""


class NotFiniteError(GenerationError):
    """The logits of a row became infinite or NaN while it was generated, as damaged weights make them."""


class QueueFullError(DbrxError):
    """As many requests wait as the engine allows; a later try may succeed."""


class RequestTimeoutError(DbrxError):
    """A request did not end within its time."""


class EngineClosedError(DbrxError):
    """The engine takes no more requests: it was closed, or it failed."""


class MeshError(DbrxError):
    """A device mesh does not fit the model or the available devices."""


class QuantizationError(DbrxError):
    """A quantisation is unknown, or does not fit the weights."""


class PlanError(DbrxError):
    """A plan names an unknown accelerator or slice, or needs a compiler that is not installed."""


class MemoryLimitError(DbrxError):
    """The memory of the host or of a device is too small for what is asked."""


class DistributedError(DbrxError):
    """The processes of a run cannot be connected, or were started with different arguments."""


class LostProcessError(DistributedError):
    """Another process of a run was lost; all must be started again."""
