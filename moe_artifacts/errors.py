"""The exceptions of this library.

Each names the argument, what was expected, what came and what to do next. All derive from ``ValueError`` or
``RuntimeError`` as well, so callers need not know them. A warning stands apart from them.
"""


class MoeArtifactsError(Exception):
    """Base class of every error raised on purpose by this library."""


class ConfigError(MoeArtifactsError, ValueError):
    """A configuration field is missing, unknown or out of range."""


class InputError(MoeArtifactsError, ValueError):
    """A tensor, list or number given by the caller is not what the function takes."""


class CheckpointError(MoeArtifactsError, ValueError):
    """A checkpoint folder is missing, damaged or of another format."""


class LatentSpaceError(MoeArtifactsError, ValueError):
    """A scorer was given latents, or a pipeline, of a latent space it was not trained on."""


class UnsupportedPipelineError(MoeArtifactsError, ValueError):
    """A pipeline, a scheduler or a call argument that the guard cannot treat correctly."""


class CalibrationError(MoeArtifactsError, ValueError):
    """There is not enough, or not the right kind of, data for the promise asked for."""


class GuardStateError(MoeArtifactsError, RuntimeError):
    """The guard is already watching this scheduler, or is used in an order that cannot work."""


class ReproducibilityWarning(UserWarning):
    """An image that a guarded run keeps cannot be made again by itself."""
