"""The command line: `furina COMMAND`; one sentence and exit status 2 where the input is wrong."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from furina import __version__
from furina.cli.commands import COMMANDS
from furina.errors import ConfigurationError, FurinaError, nearest
from furina.progress import shown

_CHATTER = "lightning.pytorch.utilities.rank_zero"
"""Lightning's logger of devices found and products to try."""

_HELP = """\
usage: furina COMMAND [options]

Fine-tune a language model with a router-free mixture of LoRA experts (or a baseline), merge it
exactly, and score and time it before and after.

commands:
{commands}

options:
  --help           show this text, or after a command that command's options
  --version        show the installed version
  --debug          show the traceback of an error (also FURINA_DEBUG=1)

start with:
  furina methods
  furina fit --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    That is 0 done, 2 wrong input, 1 a bug, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("FURINA_DEBUG", "") not in ("", "0")
    if "--debug" in words:
        words.remove("--debug")
        debug = True
    with warnings.catch_warnings():
        if not debug:  # what libraries tell their developers
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            logging.getLogger(_CHATTER).setLevel(logging.WARNING)
        warnings.showwarning = _show_warning
        logger = logging.getLogger("furina.kernels.processor")
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Lines) for handler in logger.handlers):
            logger.addHandler(_Lines())
        with shown(sys.stderr):
            return _guarded(words, debug)


def _guarded(words: list[str], debug: bool) -> int:
    try:
        _dispatch(words)
        sys.stdout.flush()
        return 0
    except SystemExit as done:
        return _left(done)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, sentence = _explain(error)
        print(f"error: {sentence}", file=sys.stderr)
        return status


def _left(done: SystemExit) -> int:
    """Return the status of what ended itself: argparse after --help, Lightning when stopped.

    Lightning answers SIGTERM by an exit without a status and Ctrl-C by status 1.
    """
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    if lightning is not None and isinstance(done, lightning.SIGTERMException):
        number = signal.SIGTERM
    elif isinstance(done.__context__, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        return done.code if isinstance(done.code, int) else 0
    print("stopped", file=sys.stderr)
    return 128 + number


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        lines = (f"  {name:<16} {command.summary()}" for name, command in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="")
    elif words[0] == "--version":
        print(f"furina {__version__}")
    elif words[0] in COMMANDS:
        COMMANDS[words[0]].call(words[1:])
    elif words[0].startswith("-"):
        known = ", ".join(COMMANDS)
        raise ConfigurationError(
            f"Unknown option {words[0]}: name a command first. Known: {known}."
        )
    else:
        raise ConfigurationError(f"Unknown command {words[0]!r}.{nearest(words[0], COMMANDS)}")


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit status and the sentence for `error`."""
    text = " ".join(str(error).split())
    if isinstance(error, FurinaError):
        return 2, text
    if isinstance(error, OSError) and error.errno is not None:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
            errno.ENOENT: "no such file or folder",
        }
        reason = reasons.get(error.errno, (error.strerror or text).lower())
        return 2, f"{error.filename}: {reason}." if error.filename else f"{reason.capitalize()}."
    hint = "this is a bug; --debug shows the traceback"
    return 1, f"{type(error).__name__}: {text or 'no message'} ({hint})."


class _Lines(logging.Handler):
    """Prints what was chosen for this processor, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
