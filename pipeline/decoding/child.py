"""The child process in which images are decoded that may kill their decoder.

Pillow's decoders are C libraries: 100,000 broken files did not crash one, which proves nothing of the next. So
whatever is no plain JPEG is decoded in a child of the worker. A process has one, which it starts when it first needs
it, keeps, and starts again when an image has killed it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import SampleError
from pipeline.decoding import pillow
from pipeline.decoding.rules import DecodingRules

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# What dies of one image may have been killed for another reason; what dies of it again was not.
_TRIES = 2
# But for what kills without a look at the image: whoever is short of memory. That passes.
_TRIES_KILLED = 6
_PAUSE_S = 1.0
_START_S = 300.0
# A request is the sizes of the rules, which are sent where they have changed, and of the image; then both.
_REQUEST = struct.Struct("<QQ")
# A reply is what follows, the processor time that it took, and its size; then that.
_REPLY = struct.Struct("<cdQ")
_READY, _PIXELS, _REASON = b"+", b"p", b"r"


class _DiedError(Exception):
    """The child ended before it answered."""


class _Child:
    """A process that decodes one image after the other."""

    def __init__(self) -> None:
        self._socket, end = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            # -P: no module of whatever folder this is run in.
            [sys.executable, "-P", "-c", f"from pipeline.decoding.child import serve; serve({end.fileno()})"],
            pass_fds=[end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        end.close()
        self._rules: DecodingRules | None = None
        self._socket.settimeout(_START_S)
        try:
            is_ready = _receive(self._socket, len(_READY)) == _READY
        except TimeoutError:
            is_ready = False
        if not is_ready:
            raise RuntimeError(f"the process that decodes images did not start: {_ending(self.end())}")
        self._socket.settimeout(None)

    def decode(self, data: bytes | memoryview, rules: DecodingRules) -> tuple[Pixels | str, float]:
        """The pixels [H, W, 3] of an image or the reason why it has none, and the seconds that it took.

        Raises:
            _DiedError: the child did.
        """
        told = b"" if rules == self._rules else pickle.dumps(rules)
        try:
            self._socket.sendall(_REQUEST.pack(len(told), len(data)) + told)
            self._rules = rules
            self._socket.sendall(data)
            kind, seconds, size = _REPLY.unpack(_receive(self._socket, _REPLY.size))
            reply = _receive(self._socket, size)
        except (OSError, struct.error) as error:
            raise _DiedError from error
        if len(reply) < size:
            raise _DiedError
        if kind == _REASON:
            return reply.decode(errors="replace"), seconds
        return np.frombuffer(reply, np.uint8).reshape(*rules.preprocess.crop, 3), seconds

    def end(self) -> int:
        """End the process, if it has not ended, and give its exit status."""
        self._socket.close()
        try:
            return self._process.wait(_PAUSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def decode(data: bytes | memoryview, rules: DecodingRules) -> tuple[Pixels, float]:
    """The pixels of one image as `pillow.decode` makes them, in this process's child, and the seconds that it took.

    Raises:
        SampleError: as `pillow.decode` does, and where the image kills the child.
    """
    with _own.lock:
        for attempt in itertools.count(1):
            child = _own.child = _own.child or _Child()
            try:
                found, seconds = child.decode(data, rules)
                break
            except _DiedError:
                status = child.end()
                _own.child = None
            killed = status == -signal.SIGKILL
            if attempt == (_TRIES_KILLED if killed else _TRIES):
                raise SampleError(f"decoder crash: it died of the image {attempt} times: {_ending(status)}")
            if killed:
                time.sleep(_PAUSE_S)
    if isinstance(found, str):
        raise SampleError(found)
    return found, seconds


class _Own:
    """This process's child, if it has one, and whose turn it is."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Also in a process that was forked: the child is its parent's."""
        self.lock = threading.Lock()
        self.child: _Child | None = None

    def end(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None


_own = _Own()
os.register_at_fork(after_in_child=_own.renew)


@atexit.register
def end() -> None:
    """End this process's child. The next image starts another."""
    with _own.lock:
        _own.end()


def serve(descriptor: int) -> None:
    """The child: decode what comes until the parent ends."""
    parent = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.filterwarnings("ignore", module="PIL")
    Image.init()
    parent.sendall(_READY)
    # What C libraries print of an image is the image's, and goes to no log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    rules: DecodingRules | None = None
    while request := _receive(parent, _REQUEST.size):
        rules_size, size = _REQUEST.unpack(request)
        if rules_size:
            rules = pickle.loads(_receive(parent, rules_size))
        assert rules is not None
        data = _receive(parent, size)
        start = time.process_time()
        try:
            kind, reply = _PIXELS, pillow.decode(data, rules).tobytes()
        except SampleError as error:
            kind, reply = _REASON, str(error).encode(errors="backslashreplace")
        parent.sendall(_REPLY.pack(kind, time.process_time() - start, len(reply)) + reply)


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, fewer where the other end has gone."""
    pieces = []
    while size > 0:
        piece = connection.recv(size, socket.MSG_WAITALL)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
