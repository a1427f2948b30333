"""Every exception that the pipeline raises on purpose."""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all errors that are raised on purpose."""


class SettingsError(PipelineError):
    """The run cannot start as asked: wrong settings, input, weights or output."""


class InputError(SettingsError):
    """The input spec names no shard, a missing shard, or one that cannot be listed."""


class BackboneError(SettingsError):
    """The backbone is unknown, or cannot give the features asked for."""


class WeightsError(SettingsError):
    """Weights cannot be had, or do not fit the backbone."""


class PrecisionError(SettingsError):
    """A processor does not compute in the precision asked for."""


class OutputError(SettingsError):
    """The output was made with another setting, or is not an output of this pipeline."""


class OutputBusyError(PipelineError):
    """Another run holds the output."""


class ClusterError(PipelineError):
    """The cluster lacks what the job needs."""


class ShardError(PipelineError):
    """A shard cannot be read to its proven end.

    `transient` says whether reading it again may succeed (a network fault) or not (damage).
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ShardChangedError(ShardError):
    """A shard is not, or cannot be shown to be, the one that was planned: what was read of it is void."""


class SampleError(PipelineError):
    """One sample cannot be embedded. The text before the first colon is its reason's class."""
