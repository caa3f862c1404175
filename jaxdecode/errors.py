"""The errors a user or a file can cause. One family: `except DecodeError` catches them all.

Every message names the argument or file, what was found, what is allowed and what to do. The rooms
below (`pallas_kernels`, `models`) raise plain ValueError and TypeError; whoever reads a file or a
user's request turns those into one of these and adds the file's name.
"""

from __future__ import annotations


class DecodeError(ValueError):
    """Base of every error that a user's input or file causes; the command line exits with 2, or
    with 1 where memory ran out."""


class RequestError(DecodeError):
    """A prompt, a sampling value or a length that cannot be served."""


class CheckpointError(DecodeError):
    """A model file that is missing, damaged, or not what its configuration says."""


class PathError(CheckpointError):
    """A path inside a model directory that points out of it, or is not a plain file name."""


class ConfigError(CheckpointError):
    """A config.json or GGUF header whose values are out of range or not supported."""


class UnsupportedRopeError(ConfigError):
    """A rotary-embedding scaling that this library does not know."""


class TokenizerError(CheckpointError):
    """A tokenizer that is missing, damaged, or does not fit the model's vocabulary."""


class ChatTemplateError(DecodeError):
    """A chat template that is missing, refuses its messages, or exceeds its limits."""


class FetchError(DecodeError):
    """The default model could not be fetched or does not have the expected checksum."""


class DeviceError(DecodeError):
    """A device or an attention implementation that this machine cannot offer."""


class MemoryPlanError(DecodeError):
    """A model and a context that do not fit into a device's memory, found before they are made."""


class OutOfMemoryError(DecodeError):
    """A device that ran out of memory all the same. The command line exits with 1."""


class NonFiniteLogitsError(DecodeError):
    """The model produced NaN or infinity, so there is nothing to sample from.

    Attributes:
      step: index of the generated token, counted from 0.
      row: index of the sequence in the batch.
    """

    def __init__(self, step: int, row: int):
        super().__init__(
            f"the model's logits are not finite at generated token {step} of sequence {row}; "
            "check the weights with `jaxdecode inspect`, or load with dtype='float32' if the "
            "model overflows in a 16-bit type"
        )
        self.step = step
        self.row = row
