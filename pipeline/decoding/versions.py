"""Which Pillow is safe to decode untrusted files with."""

from __future__ import annotations

import re
import socket

import PIL

from shard_embedder.pipeline.core.errors import ClusterError

# The first without GHSA-8g5g-8vmr-9782 (JPEG decoder, buffer overflow), CVE-2026-96639 (storage that is used after a
# change of mode) and GHSA-462x-pgg6-55fp (TIFF decoder, read out of bounds). pyproject.toml requires it too.
LEAST_PILLOW = (13, 0)


def require_pillow(installed: str = PIL.__version__) -> None:
    """Check the version on this node, which may have been set up apart from the others.

    Raises:
        ClusterError: it is older than what the project requires.
    """
    version = tuple(map(int, re.findall(r"\d+", installed)[: len(LEAST_PILLOW)]))
    if version < LEAST_PILLOW:
        least = ".".join(map(str, LEAST_PILLOW))
        raise ClusterError(
            f"Pillow must be at least {least} on every node, got {installed} on {socket.gethostname()}: "
            "its decoders have known faults that a file can use"
        )
