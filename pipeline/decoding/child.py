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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import heif, pillow
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.versions import heif_version, require_pillow

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# What dies of one image may have been killed for another reason; what dies of it again was not.
_TRIES = 2
# But for what kills without a look at the image: whoever is short of memory. That passes.
_TRIES_KILLED = 6
_PAUSE_S = 1.0
_START_S = 300.0
# The child is ended by the clock of its processor time. One that has stopped, which has none, is waited for so many
# times as long.
_MAX_WAIT = 20.0
# A request is what is asked, the sizes of the rules, sent where they have changed, and of the image; then both.
_REQUEST = struct.Struct("<cQQ")
# A reply is what follows, the processor time that it took, whether the child ends with it, and its size; then that.
_REPLY = struct.Struct("<cd?Q")
_READY, _PIXELS, _SIZE, _REASON = b"+", b"p", b"s", b"r"
_WIDTH_AND_HEIGHT = struct.Struct("<QQ")
_MAX_REASON = 2**16
# A child that has grown by so much, whatever the reason, is replaced: its limit of memory would be that much less.
_MAX_GROWTH = 128 * 2**20
_VIRTUAL_MEMORY = Path("/proc/self/statm")


class _DiedError(Exception):
    """The child ended before it answered."""


class _SilentError(Exception):
    """The child did not answer in time."""


class _Child:
    """A process that decodes one image after the other."""

    def __init__(self) -> None:
        require_pillow()
        self._socket, end = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            # -P: no module of whatever folder this is run in.
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({end.fileno()})"],
            pass_fds=[end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        end.close()
        self._rules: DecodingRules | None = None
        self.is_ending = False
        self._socket.settimeout(_START_S)
        try:
            _receive(self._socket, len(_READY))
        except (OSError, EOFError) as error:
            ending = _ending(self.end())
            raise RuntimeError(f"the process that decodes images did not start: {ending}") from error

    def ask(
        self, what: bytes, data: bytes | memoryview, rules: DecodingRules, answer_size: int
    ) -> tuple[bytearray | str, float]:
        """What is asked of an image or the reason why it cannot be had, and the seconds that it took.

        Raises:
            _DiedError: the child did.
            _SilentError: the child has stopped.
        """
        self._socket.settimeout(_MAX_WAIT * rules.image_timeout_s)
        told = b"" if rules == self._rules else pickle.dumps(rules)
        try:
            self._socket.sendall(_REQUEST.pack(what, len(told), len(data)) + told)
            self._rules = rules
            self._socket.sendall(data)
            kind, seconds, self.is_ending, size = _REPLY.unpack(_receive(self._socket, _REPLY.size))
            # It has met untrusted files: nothing that it says is taken for more than it may be.
            if size > _MAX_REASON if kind == _REASON else (kind, size) != (what, answer_size):
                raise _DiedError
            reply = _receive(self._socket, size)
        except TimeoutError as error:
            raise _SilentError from error
        except (OSError, EOFError) as error:
            raise _DiedError from error
        if kind == _REASON:
            return reply.decode(errors="replace"), seconds
        return reply, seconds

    def kill(self) -> None:
        """End the process at once, whoever waits for it."""
        self._process.kill()

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
    height, width = rules.preprocess.crop
    pixels, seconds = _answer(_PIXELS, data, rules, 3 * height * width)
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3), seconds


def upright_size(data: bytes | memoryview, rules: DecodingRules) -> tuple[int, int]:
    """Width and height of one image as it is to be seen. Raises `SampleError` as `decode` does."""
    width, height = _WIDTH_AND_HEIGHT.unpack(_answer(_SIZE, data, rules, _WIDTH_AND_HEIGHT.size)[0])
    return width, height


def _answer(what: bytes, data: bytes | memoryview, rules: DecodingRules, size: int) -> tuple[bytearray, float]:
    with _own.lock:
        for attempt in itertools.count(1):
            child = _own.child = _own.child or _Child()
            try:
                found, seconds = child.ask(what, data, rules, size)
                if child.is_ending:
                    _own.end()
                break
            except _SilentError:
                child.kill()
                _own.end()
                if attempt == _TRIES:
                    wait_s = _MAX_WAIT * rules.image_timeout_s
                    raise SampleError(f"decoder timeout: no answer within {wait_s:g} s, {attempt} times") from None
                continue
            except _DiedError:
                status = _own.end()
            except BaseException:
                # Its answer would be taken for that to the next image.
                child.kill()
                _own.end()
                raise
            if status == -signal.SIGPROF:
                raise SampleError(f"decoder timeout: it took over {rules.image_timeout_s:g} s of processor time")
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

    def end(self) -> int:
        """End the child, if there is one, and give its exit status."""
        child, self.child = self.child, None
        return 0 if child is None else child.end()


_own = _Own()
os.register_at_fork(after_in_child=_own.renew)


@atexit.register
def end() -> None:
    """End this process's child. The next image starts another."""
    if _own.lock.acquire(timeout=_PAUSE_S):
        try:
            _own.end()
        finally:
            _own.lock.release()
    elif _own.child is not None:
        # At exit, with a thread that still waits for its answer.
        _own.child.kill()


def serve(descriptor: int) -> None:
    """The child: decode what comes until the parent ends."""
    parent = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.filterwarnings("ignore", module="PIL")
    Image.init()
    if heif_version() is not None:
        heif.register()
    # A task decodes on one core.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    parent.sendall(_READY)
    before = _virtual_bytes()
    # What C libraries print of an image is the image's, and goes to no log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    rules: DecodingRules | None = None
    while True:
        try:
            what, rules_size, size = _REQUEST.unpack(_receive(parent, _REQUEST.size))
        except EOFError:
            return
        if rules_size:
            rules = pickle.loads(_receive(parent, rules_size))
        assert rules is not None
        # The file is there twice while it is taken in.
        _limit_memory(before + rules.memory_bytes + 2 * size)
        data = bytes(_receive(parent, size))
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, rules.image_timeout_s)
        try:
            if what == _PIXELS:
                kind, reply = what, pillow.decode(data, rules).tobytes()
            else:
                kind, reply = what, _WIDTH_AND_HEIGHT.pack(*pillow.upright_size(data, rules))
        except SampleError as error:
            kind, reply = _REASON, str(error).encode(errors="backslashreplace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        del data
        is_ending = _virtual_bytes() > before + _MAX_GROWTH
        parent.sendall(_REPLY.pack(kind, time.process_time() - start, is_ending, len(reply)) + reply)


def _virtual_bytes() -> int:
    """The address space of this process; 0 where the system does not say."""
    try:
        return int(_VIRTUAL_MEMORY.read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def _limit_memory(num_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    if _VIRTUAL_MEMORY.exists():
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _receive(connection: socket.socket, size: int) -> bytearray:
    """So many bytes. Raises `EOFError` where the other end has gone."""
    received = bytearray(size)
    left = memoryview(received)
    while left:
        count = connection.recv_into(left)
        if count == 0:
            raise EOFError
        left = left[count:]
    return received


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
