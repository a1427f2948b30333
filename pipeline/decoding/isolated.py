"""Decoding in a process of its own, so that an image that kills the decoder kills nothing else.

Pillow's decoders are C libraries: 100,000 broken files did not crash one, which proves nothing of the next.
A crash kills the worker with its part. After a pass that failed, parts are therefore decoded here, where it
costs a child process, and names the image.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.errors import SampleError
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.rules import DecodingRules

_PIXELS, _REASON = b"p", b"r"
# What dies on one image may have been killed for another reason; what dies on it again was not.
_TRIES = 2
# But for what kills without a look at the image: whoever is short of memory. That passes.
_TRIES_KILLED = 6
_PAUSE_S = 1.0


class IsolatedDecoder(Decoder):
    """Decodes as `Decoder` does, in a child process that is started again when an image kills it; for one thread."""

    # It is the child that computes.
    clock = staticmethod(time.perf_counter)

    def __init__(self, rules: DecodingRules) -> None:
        super().__init__(rules)
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def decode(self, data: bytes | pa.Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One encoded image as uint8 RGB of shape [H, W, 3].

        Raises:
            SampleError: as `Decoder.decode` does, and where the image kills the decoder.
        """
        for attempt in itertools.count(1):
            child, pipe = self._child or self._start()
            try:
                pipe.send_bytes(memoryview(data))
                reply = pipe.recv_bytes()
                break
            except (EOFError, OSError):
                pipe.close()
                status = child.wait()
                self._child = None
            killed = status == -signal.SIGKILL
            if attempt == (_TRIES_KILLED if killed else _TRIES):
                raise SampleError(f"decoder crash: it died of the image {attempt} times: {_died_of(status)}")
            if killed:
                time.sleep(_PAUSE_S)
        if reply[:1] == _REASON:
            raise SampleError(reply[1:].decode())
        return np.frombuffer(reply, np.uint8, offset=1).reshape(*self.rules.preprocess.crop, 3)

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        pipe, end = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.Popen(
            [sys.executable, "-c", f"from pipeline.decoding.isolated import serve; serve({end.fileno()})"],
            pass_fds=[end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        end.close()
        pipe.send(self.rules)
        self._child = child, pipe
        return self._child


def serve(descriptor: int) -> None:
    """The child: decode what comes until the parent closes the pipe, or ends."""
    pipe = Connection(descriptor)
    decoder = Decoder(pipe.recv())
    warnings.filterwarnings("ignore", module="PIL")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            reply = _PIXELS + decoder.decode(data).tobytes()
        except SampleError as error:
            reply = _REASON + str(error).encode(errors="backslashreplace")
        pipe.send_bytes(reply)


def _died_of(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
