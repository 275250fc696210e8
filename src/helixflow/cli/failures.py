"""How errors end a command: one clear line on standard error and an exit code, a traceback only on request."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from helixflow.cli.output import printable
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

if TYPE_CHECKING:
    from helixflow.cli.invocation import Invocation

_UNAVAILABLE = frozenset(
    {
        ErrorKind.UNAVAILABLE,
        ErrorKind.UPSTREAM_UNAVAILABLE,
        ErrorKind.OVERLOADED,
        ErrorKind.LOADING,
        ErrorKind.NOT_SERVED,
        ErrorKind.SHUTTING_DOWN,
        ErrorKind.DEADLINE,
    }
)


def exit_code_of(error: HelixError) -> ExitCode:
    """What a service's error means for the one who called it from a shell."""
    if error.kind in _UNAVAILABLE:
        return ExitCode.UNAVAILABLE
    if error.kind is ErrorKind.MODEL_NOT_FOUND:
        return ExitCode.MODEL
    if error.kind is ErrorKind.STORAGE_FULL:
        return ExitCode.STORAGE
    return ExitCode.FAILURE


def print_error(message: str) -> None:
    """Each line of `message` on standard error, so that no line stands there unexplained."""
    lines = [line for line in printable(message).splitlines() if line.strip()] or ["failed"]
    sys.stderr.write("".join(f"helixflow: {line}\n" for line in lines))


def run_guarded(command: Callable[[], int], invocation: "Invocation") -> int:
    """Runs `command` and returns its exit code; whatever it raises becomes a line and a code."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence(sys.stdout.fileno())
        return ExitCode.FAILURE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except UserError as exc:
        _show_cause(exc, invocation)
        print_error(exc.message)
        return exc.exit_code
    except HelixError as exc:
        _show_cause(exc, invocation)
        print_error(exc.message)
        return exit_code_of(exc)
    except OSError as exc:
        _show_cause(exc, invocation)
        if exc.errno == errno.ENOSPC and exc.filename is None:
            _silence(sys.stdout.fileno())
        print_error(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror or exc))
        return ExitCode.STORAGE if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ExitCode.FAILURE
    except Exception as exc:  # noqa: BLE001  (the boundary: a fault of ours must not bury the terminal)
        _show_cause(exc, invocation)
        hint = "" if invocation.debug else " (helixflow --debug … shows the traceback)"
        print_error(f"unexpected {type(exc).__name__}: {exc}{hint}")
        return ExitCode.FAILURE


def _show_cause(error: Exception, invocation: "Invocation") -> None:
    if invocation.debug:
        traceback.print_exception(error)


def _silence(descriptor: int) -> None:
    """Points a descriptor nowhere, so that the interpreter's last flush does not fail aloud."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
