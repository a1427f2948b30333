"""Which versions of the decoders are here, and which will do: of Pillow and pillow-heif, those known to be safe."""

from __future__ import annotations

import functools
import re
import socket
from importlib.metadata import PackageNotFoundError, version

import PIL

from shard_embedder.pipeline.core.errors import ClusterError, SettingsError

# The first without GHSA-8g5g-8vmr-9782 (JPEG decoder, buffer overflow), CVE-2026-96639 (storage that is used after a
# change of mode) and GHSA-462x-pgg6-55fp (TIFF decoder, read out of bounds). pyproject.toml requires it too.
LEAST_PILLOW = (13, 0)

# Its libheif, 1.23.6, is the oldest that was tested. pyproject.toml requires it too.
LEAST_HEIF = (1, 8, 1)
INSTALL_HEIF = f"pip install 'pillow-heif>={'.'.join(map(str, LEAST_HEIF))}'"

# The first that decodes JPEGs. pyproject.toml requires it too.
LEAST_TORCHCODEC = (0, 16)


@functools.cache
def heif_version() -> str | None:
    """The version of pillow-heif here; None where it is not installed, and HEIC images cannot be decoded."""
    return _installed("pillow-heif")


def require_heif(installed: str | None) -> None:
    """Check that this node decodes HEIC images as the job's driver does.

    Raises:
        ClusterError: pillow-heif is missing, or older than what the project requires.
    """
    if installed is None or _is_older(installed, LEAST_HEIF):
        least = ".".join(map(str, LEAST_HEIF))
        raise ClusterError(
            f"pillow-heif must be at least {least} on every node, as the job's driver has it, got "
            f"{installed or 'none'} on {socket.gethostname()}: {INSTALL_HEIF}"
        )


def torchcodec_version() -> str | None:
    """The version of torchcodec here; None where it is not installed."""
    return _installed("torchcodec")


def require_torchcodec(installed: str | None) -> None:
    """Check that devices can decode JPEGs.

    Raises:
        SettingsError: torchcodec is missing, or older than what the project requires.
    """
    if installed is None or _is_older(installed, LEAST_TORCHCODEC):
        least = ".".join(map(str, LEAST_TORCHCODEC))
        raise SettingsError(
            f"decode gpu needs torchcodec {least} or newer, got {installed or 'none'}: "
            f"pip install 'torchcodec>={least}' here and on every node"
        )


def require_decoders(heif: bool) -> None:
    """Check Pillow on this node, and pillow-heif where HEIC images are decoded. Raises `ClusterError`."""
    require_pillow()
    if heif:
        require_heif(heif_version())


def require_pillow(installed: str = PIL.__version__) -> None:
    """Check the version on this node, which may have been set up apart from the others.

    Raises:
        ClusterError: it is older than what the project requires.
    """
    if _is_older(installed, LEAST_PILLOW):
        least = ".".join(map(str, LEAST_PILLOW))
        raise ClusterError(
            f"Pillow must be at least {least} on every node, got {installed} on {socket.gethostname()}: "
            "its decoders have known faults that a file can use"
        )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_older(installed: str, least: tuple[int, ...]) -> bool:
    return tuple(map(int, re.findall(r"\d+", installed)[: len(least)])) < least
