"""Every exception that the pipeline raises on purpose."""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all errors that are raised on purpose."""


class SettingsError(PipelineError):
    """The run cannot start as asked: wrong settings, input, weights or output."""


class InputError(SettingsError):
    """The input spec names no shard, a missing shard, or one that cannot be listed."""


class NoShardError(InputError):
    """A folder, or another of the things that the input names, holds no shard."""


class BackboneError(SettingsError):
    """The backbone is unknown, or cannot give the features asked for."""


class WeightsError(SettingsError):
    """Weights cannot be had, or do not fit the backbone."""


class PrecisionError(SettingsError):
    """A processor does not compute in the precision asked for."""


class OutputError(SettingsError):
    """The output, or an index, cannot be used: it is none of this pipeline, or cannot be written."""


class OtherSettingsError(OutputError):
    """The output was made with other settings than those asked for."""


class StoredDataError(OutputError):
    """Something stored is not what it should be: it is missing, damaged, or was changed by hand."""


class OutputBusyError(PipelineError):
    """Another run holds the output."""


class ClusterError(PipelineError):
    """The cluster lacks what the job needs."""


class DeviceError(PipelineError):
    """A process can use its device no more; another process may."""


class StoreError(PipelineError, OSError):
    """A disk or an object store refused, failed, or did not answer in time.

    It is an `OSError`, as the faults of a local disk are. `transient` says that each attempt failed with a fault
    that may pass.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


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
