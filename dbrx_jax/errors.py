"""The errors that a user can cause and mend. The command line prints each as one line and exits with 2."""


class DbrxError(ValueError):
    """Base of all errors that come from the user's input; the message says what, where and what to do."""


class ConfigError(DbrxError):
    """A configuration is missing, damaged, or has a value that cannot be used."""


class CheckpointError(DbrxError):
    """A checkpoint is missing, damaged or incomplete, or does not fit its configuration."""


class TokenizerError(DbrxError):
    """A tokenizer's files are missing or damaged, or a chat template failed."""


class GenerationError(DbrxError):
    """Arguments of generate that do not fit each other or the model."""


class MeshError(DbrxError):
    """A mesh of devices does not fit the model, or the devices that there are."""


class QuantizationError(DbrxError):
    """A quantisation is not known, or weights cannot be quantised in that way."""


class PlanError(DbrxError):
    """A plan names an accelerator or a slice that is unknown, or needs a compiler that is not installed."""


class DistributedError(DbrxError):
    """The processes of a run cannot be connected, or were started with different arguments."""
