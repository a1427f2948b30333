"""A command line whose errors show no secret."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pipeline.redact import redact


class Parser(argparse.ArgumentParser):
    """Shows no secret that was mistyped."""

    def error(self, message: str) -> NoReturn:
        """End with 2 and the message."""
        super().error(redact(message))
