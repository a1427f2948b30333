#!/usr/bin/env python3
"""Submit a job to a Ray cluster, follow its log, and exit with the job's own exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from shard_embedder.jobs.support.command import CommandError, Parser, as_typed, run_command, tell
from shard_embedder.jobs.support.exit_codes import EXIT_OK, EXIT_TERMINATED, EXIT_USAGE
from shard_embedder.jobs.support.upload import check_size
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.redact import REFUSAL, has_secret, show
from shard_embedder.pipeline.core.threads import begin

_PROG = "submit.py"
EXIT_FAILED = 1
EXIT_UNREACHABLE = 69
DEFAULT_ENTRYPOINT = ("jobs/embed.py",)
# Files of a checkout that the job does not need. Ray also leaves out what .gitignore names.
EXCLUDES = (
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "/demo", "/tests", "/benchmarks",
    # What the docs call data, and what a build leaves.
    "/tour", "/shards", "/embeddings", "/index", "/build", "/dist",
)  # fmt: skip
_RETRY_EVERY_S = 1.0
# Requests of Ray may wait for ever: each has a thread that no exit waits for.
_THREAD = "ask-cluster"
# Ray writes a job's variables into its own logs, which must not hold credentials.
_SECRET = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|PRIVATE|(?:ACCESS|API|ACCOUNT|SHARED|SIGNING)_?KEY|_PWD$|"
    r"(?:^|_)(?:AUTH|PASS|JWT|SAS)(?:_|$)",
    re.IGNORECASE,
)
# A line of a job's log may be coloured by Ray.
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_EPILOG = """\
The exit code is the job's own where the job ended by itself (128 + N where signal N ended it).
"""
_EXIT_CODES = {
    EXIT_FAILED: "the job failed before its command ran, or Ray lost it; the reason is printed",
    EXIT_USAGE: "wrong usage, the cluster wants another token, or the submission id is taken; nothing was started",
    EXIT_UNREACHABLE: "the cluster cannot be reached, or did not answer for a minute; the job may still run",
    EXIT_TERMINATED: "someone else stopped the job",
}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for the cluster."""

    lost_s: float = 60.0  # without any sign of it, the cluster cannot be reached
    answer_s: float = 20.0  # for one answer
    quiet_s: float = 15.0  # without a line of the log, ask whether the job is silent or the cluster gone
    submitted_s: float = 1800.0  # for a submission, which uploads a working folder of at most 100 MiB


PATIENCE = Patience()


def parser() -> Parser:
    """The command line, without the entrypoint after `--`."""
    top = Parser(
        _PROG,
        usage="%(prog)s [option ...] [-- COMMAND [argument ...]]",
        description=f"{__doc__} The default COMMAND is {shlex.join(DEFAULT_ENTRYPOINT)}.",
        epilog=_EPILOG,
        examples=[
            "-- jobs/embed.py --input s3://b/in --output s3://b/out",
            "--env EMBED_INPUT --submission-id embed-2031-w07",
        ],
        exit_codes=_EXIT_CODES,
        interrupted="the job goes on, or stops with --stop-on-interrupt",
    )
    top.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine's)",
    )
    top.add_argument(
        "--submission-id",
        metavar="ID",
        help="name of the job, and a lock: a cluster runs each id once, and refuses a second submission",
    )
    top.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this environment variable to the job; repeat for more. Credentials are refused: Ray logs them",
    )
    top.add_argument("--working-dir", default=".", metavar="FOLDER", help="folder to upload (default: .)")
    top.add_argument(
        "--stop-on-interrupt",
        action="store_true",
        help="on Ctrl-C or SIGTERM stop the job too (default: it goes on without this program)",
    )
    return top


def chosen_variables(names: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` with these names.

    Raises:
        SettingsError: one is not set, or looks like a credential.
    """
    for name in names:
        if _SECRET.search(name):
            raise SettingsError(
                f"--env must not name a credential, got {name}: Ray writes a job's variables into its logs; "
                "give the cluster's machines a role, or the variable itself"
            )
        if has_secret(environment.get(name, "")):
            raise SettingsError(
                f"--env must not name a URL with credentials, got {name}: Ray writes a job's variables into its logs"
            )
        if name not in environment:
            raise SettingsError(f"--env must name a variable that is set, got {name}")
    return {name: environment[name] for name in names}


def check_entrypoint(entrypoint: list[str]) -> None:
    """Raise `SettingsError` if the command carries a credential: Ray stores it, and shows it to anyone who asks."""
    for argument in entrypoint:
        name = argument.partition("=")[0]
        if has_secret(argument) or ("=" in argument and name.isidentifier() and _SECRET.search(name)):
            raise SettingsError(f"the command {REFUSAL}; Ray shows the command of a job")


def check_script(entrypoint: list[str], working_dir: str) -> None:
    """Raise `SettingsError` if the command is a script that is not in the folder to upload."""
    script = entrypoint[0]
    if script.endswith(".py") and not os.path.isfile(os.path.join(working_dir, script)) and not os.path.isabs(script):
        raise SettingsError(
            f"the command {script} must be in --working-dir, got {working_dir!r}: name a clone, or run the command "
            "that is installed on the cluster: -- shard-embedder embed ..."
        )


def connect(address: str | None, patience: Patience) -> JobSubmissionClient:
    """A client of the cluster at `address`.

    Raises:
        CommandError: the cluster cannot be reached.
        SettingsError: the cluster wants another token.
    """
    try:
        client: JobSubmissionClient = begin(lambda: JobSubmissionClient(address), _THREAD).result(patience.lost_s)
        return client
    except TimeoutError as error:
        raise CommandError(f"the cluster did not answer for {patience.lost_s:g} s", EXIT_UNREACHABLE) from error
    except (OSError, RuntimeError) as error:
        raise CommandError(f"the cluster cannot be reached: {error}", EXIT_UNREACHABLE) from error
    except AuthenticationError as error:
        # The rest of Ray's message says how to make a token.
        said = error.message.partition("\n")[0]
        raise SettingsError(f"RAY_AUTH_MODE must be token and RAY_AUTH_TOKEN the cluster's token: {said}") from error


def submit(
    client: JobSubmissionClient,
    entrypoint: list[str],
    *,
    submission_id: str | None,
    working_dir: str,
    variables: Mapping[str, str],
    patience: Patience,
) -> str:
    """Upload the working folder, start the job, and return its submission id.

    Raises:
        SettingsError: the id or the working folder breaks its rule, or the id is taken.
        CommandError: Ray refuses the job, or cannot be reached.
    """
    if submission_id is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", submission_id):
        raise SettingsError(f"--submission-id must be of letters, digits, '.', '_' and '-', got {submission_id!r}")
    if not os.path.isdir(working_dir):
        raise SettingsError(f"--working-dir must be a folder, got {working_dir!r}")
    check_script(entrypoint, working_dir)
    check_size(working_dir, EXCLUDES)
    runtime_env = {
        "working_dir": working_dir,
        "excludes": list(EXCLUDES),
        # Without this Python buffers a job's output, as it is no terminal.
        "env_vars": {"PYTHONUNBUFFERED": "1", **variables},
    }
    try:
        started: str = begin(
            lambda: client.submit_job(
                entrypoint=shlex.join(entrypoint), submission_id=submission_id, runtime_env=runtime_env
            ),
            _THREAD,
        ).result(patience.submitted_s)
    except RuntimeError as error:
        if submission_id is not None and "already exists" in str(error):
            raise SettingsError(_taken(client, submission_id, patience)) from error
        raise CommandError(f"Ray refused the job: {error}", EXIT_FAILED) from error
    except TimeoutError as error:
        raise CommandError(
            f"the cluster did not take the job within {patience.submitted_s:g} s, it may still run", EXIT_UNREACHABLE
        ) from error
    except (OSError, ValueError) as error:
        raise CommandError(f"the job could not be submitted: {error}", EXIT_FAILED) from error
    return started


def _taken(client: JobSubmissionClient, submission_id: str, patience: Patience) -> str:
    try:
        status = begin(lambda: client.get_job_info(submission_id), _THREAD).result(patience.answer_s).status
    except (OSError, RuntimeError):
        return f"job {submission_id} is on this cluster already: nothing was started"
    if status.is_terminal():
        return f"job {submission_id} has run on this cluster already ({status.value}): choose another --submission-id"
    return (
        f"job {submission_id} is {status.value} on this cluster: nothing was started. "
        f"Follow it: ray job logs --follow {submission_id}"
    )


async def _details(client: JobSubmissionClient, submission_id: str, patience: Patience) -> Any:
    asked = asyncio.wrap_future(begin(lambda: client.get_job_info(submission_id), _THREAD))
    try:
        return await asyncio.wait_for(asked, patience.answer_s)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {patience.answer_s:g} s") from error


async def _log(client: JobSubmissionClient, submission_id: str, patience: Patience) -> AsyncIterator[str]:
    """The job's log from its beginning, as it grows. Yields an empty text when the cluster answers without new log.

    Raises:
        OSError: the cluster does not answer, or this connection to it lost the end of the log.
    """
    ended = (await _details(client, submission_id, patience)).status.is_terminal()
    yield ""
    texts = client.tail_job_logs(submission_id)
    while True:
        coming = asyncio.ensure_future(anext(texts, None))
        # If asking for the status fails first, nobody reads this failure.
        coming.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not (await asyncio.wait([coming], timeout=patience.quiet_s))[0]:
                if ended:
                    return
                if (await _details(client, submission_id, patience)).status.is_terminal():
                    raise ConnectionError("the end of its log does not come")
                yield ""
        finally:
            coming.cancel()
        if (text := coming.result()) is None:
            return
        yield text


async def follow(client: JobSubmissionClient, submission_id: str, patience: Patience) -> Any:
    """Print the job's log as it grows, and return the job's details once it has ended.

    It connects again when the connection is lost, and continues the log where it stopped. A cluster that does not
    answer in time counts as lost.

    Raises:
        CommandError: the cluster could not be reached for `patience.lost_s`.
    """
    num_printed = 0
    printer = _LogPrinter()
    last_heard = time.monotonic()
    while True:
        try:
            num_seen = 0
            async for text in _log(client, submission_id, patience):
                printer.write(text[max(0, num_printed - num_seen) :])
                num_seen += len(text)
                num_printed = max(num_printed, num_seen)
                last_heard = time.monotonic()
            details = await _details(client, submission_id, patience)
            if details.status.is_terminal():
                printer.end()
                return details
            last_heard = time.monotonic()
        except (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError) as error:
            if time.monotonic() - last_heard > patience.lost_s:
                raise CommandError(
                    f"nothing heard of job {submission_id} for {patience.lost_s:g} s, it may still run: {error}",
                    EXIT_UNREACHABLE,
                ) from error
        await asyncio.sleep(_RETRY_EVERY_S)


def job_exit_code(details: Any) -> int:
    """The exit code of an ended job's own command."""
    if details.status == JobStatus.STOPPED:
        return EXIT_TERMINATED
    if details.driver_exit_code is None:
        return EXIT_OK if details.status == JobStatus.SUCCEEDED else EXIT_FAILED
    code = int(details.driver_exit_code)
    return code if code >= 0 else 128 - code


async def run(client: JobSubmissionClient, submission_id: str, *, stop_on_interrupt: bool, patience: Patience) -> int:
    """Follow the job to its end, or until Ctrl-C or SIGTERM, and return the exit code."""
    following = asyncio.ensure_future(follow(client, submission_id, patience))
    received: list[int] = []

    def interrupt(number: int) -> None:
        # A second signal always ends this program, even if the job does not stop.
        if stop_on_interrupt and not received:
            _say(f"stopping job {submission_id}")
            begin(lambda: client.stop_job(submission_id), _THREAD)
        else:
            following.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
    try:
        details = await following
    except asyncio.CancelledError:
        _say(
            f"job {submission_id} goes on. Follow it: ray job logs --follow {submission_id}; "
            f"stop it: ray job stop {submission_id}"
        )
        return 128 + received[0]
    code = job_exit_code(details)
    if details.driver_exit_code is None and details.message:
        _say(details.message)
    _say(f"job {submission_id} {details.status.value}, exit code {code}")
    if received and details.status == JobStatus.STOPPED:
        return 128 + received[0]
    return code


class _LogPrinter:
    """Prints a job's log through `show`, in whole lines: a secret may be split between two texts."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> None:
        """Print the lines that are whole by now."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._print(line)
        sys.stdout.flush()

    def end(self) -> None:
        """Print the rest, which is no whole line."""
        if self._begun:
            self._print(self._begun)
        sys.stdout.flush()

    @staticmethod
    def _print(line: str) -> None:
        sys.stdout.write(f"{show(_COLOR.sub('', line.rstrip(chr(13))))}\n")


def _say(text: str) -> None:
    tell(as_typed(_PROG), text)


def _submit_and_follow(options: argparse.Namespace, entrypoint: list[str], patience: Patience) -> int:
    variables = chosen_variables(options.env, os.environ)
    check_entrypoint(entrypoint)
    client = connect(options.address, patience)
    submission_id = submit(
        client,
        entrypoint,
        submission_id=options.submission_id,
        working_dir=options.working_dir,
        variables=variables,
        patience=patience,
    )
    _say(f"job {submission_id} submitted: {shlex.join(entrypoint)}")
    return asyncio.run(run(client, submission_id, stop_on_interrupt=options.stop_on_interrupt, patience=patience))


def main(arguments: list[str] | None = None, patience: Patience = PATIENCE) -> int:
    """Submit, follow, and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    entrypoint = given[end + 1 :] or list(DEFAULT_ENTRYPOINT)
    return run_command(parser(), given[:end], lambda options: _submit_and_follow(options, entrypoint, patience))


if __name__ == "__main__":
    sys.exit(main())
