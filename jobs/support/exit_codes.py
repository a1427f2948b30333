"""Exit codes of the commands, and which errors lead to which."""

from __future__ import annotations

import signal

from shard_embedder.pipeline.core.errors import ClusterError, OutputBusyError, PipelineError, SettingsError
from shard_embedder.pipeline.run import verdict

# `verdict` has all those of a run that came to its end.
EXIT_OK = verdict.EXIT_OK
EXIT_FAILED = verdict.EXIT_FAILED
EXIT_USAGE = 2
# As in sysexits.h: a temporary failure, try again later. The launcher of scheduled runs uses it too.
EXIT_BUSY = 75
EXIT_TERMINATED = 128 + signal.SIGTERM

# The first class that fits an error decides.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (OutputBusyError, EXIT_BUSY),
    (SettingsError, EXIT_USAGE),
    (ClusterError, EXIT_USAGE),
    (PipelineError, EXIT_FAILED),
    (OSError, EXIT_FAILED),
    (KeyboardInterrupt, 128 + signal.SIGINT),
)


def code_of(error: BaseException) -> int:
    """The exit code that an error leads to; that of a `SystemExit` is its own."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)
