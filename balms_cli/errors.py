"""One family of errors, each with the exit code a shell sees.

A message is one line for a person: what is wrong, then what to do about it. The command line prints it as it stands;
the traceback is shown only with ``--debug``.
"""


class BalmsError(Exception):
    """Base of every error that is the user's to mend. ``exit_code`` is what the process returns."""

    exit_code = 1


class ConfigError(BalmsError):
    """Wrong usage or configuration: an unknown key, a value out of range, a full ``--out`` folder."""

    exit_code = 2


class DataError(BalmsError):
    """Data is missing or invalid: no images, an unreadable file, a class without images, no network."""

    exit_code = 3


class CheckpointError(BalmsError):
    """A checkpoint is corrupt, foreign, or does not fit the data it is used with."""

    exit_code = 4


class DivergedError(BalmsError):
    """The loss is no longer finite. Raised before the step that would have spoilt the weights."""

    exit_code = 5


class GateError(BalmsError):
    """A quality gate (``--require``) was not met."""

    exit_code = 6


class Interrupted(BalmsError):
    """SIGINT or SIGTERM. The message holds the command that resumes the run, where there is one."""

    exit_code = 130


def one_line(error: BaseException, limit: int = 120) -> str:
    """The first line of another library's error, or its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0][:limit] if lines and lines[0] else type(error).__name__
