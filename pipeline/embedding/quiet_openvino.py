"""OpenVINO without its telemetry, which would call an analytics host and write to the home folder when imported.

Whoever needs OpenVINO imports it from here, so that it is loaded here first.
"""

from __future__ import annotations

import sys

_TELEMETRY = "openvino_telemetry"

# Where its import fails, OpenVINO takes a stub of its own.
_is_loaded = _TELEMETRY in sys.modules
if not _is_loaded:
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
try:
    import openvino as ov
    from openvino.tools import ovc
finally:
    if not _is_loaded:
        del sys.modules[_TELEMETRY]

__all__ = ["ov", "ovc"]
