"""The application: command groups (loaded when called), exit status, one line per error on stderr.

Exit status: 0 done, 1 bad data or a failed check, 2 usage, 130 interrupted.
"""

import dataclasses
import errno
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w
from cyclopts import App, CycloptsError
from cyclopts.config import Toml

import structkd
from structkd.cli.output import Common, Output, show
from structkd.errors import StructKDError, UsageError
from structkd.runs import plain

app = App(
    name="structkd", help="Graph-to-MLP and ranking distillation.", version=structkd.__version__, help_format="markdown"
)
for _module, _help in {
    "data": "Built-in datasets: list, make, check.",
    "graph.main": "Node classifiers: GNN teachers to MLP students.",
    "ranking.main": "Ranking models: cross-architecture distillation.",
    "index": "Vector and text indexes.",
    "scores": "Teacher-score caches and files.",
}.items():
    app.command(f"structkd.cli.{_module}:app", name=_module.partition(".")[0], help=_help)
app.command("structkd.cli.report:report", name="report", help="Draw one self-contained HTML report of run folders.")
app.command(
    "structkd.cli.quickstart:quickstart", name="quickstart", help="Both halves on embedded data, offline, in minutes."
)
app.register_install_completion_command(help="Complete commands and flags with the tab key, in bash, zsh or fish.")


def run(tokens: Sequence[str]) -> int:
    """Parse and run one command line; returns the exit status."""
    try:
        app.config = _config_files(tokens)
        command, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
        common = next((value for value in bound.arguments.values() if isinstance(value, Common)), None)
        if common is not None and common.dry_run:
            resolved = _resolved(bound.arguments) | {"seed": common.seed}
            show(Output(resolved, lines=[tomli_w.dumps(plain(resolved)).rstrip()]), common.json)
            return 0
        output = command(*bound.args, **bound.kwargs)
        if isinstance(output, Output):
            show(output, common is not None and common.json)
            return 0 if output.ok else 1
        return 0
    except CycloptsError as error:
        return _fail(f"{error} {_help_of(tokens)}", 2)
    except UsageError as error:
        return _fail(str(error), 2)
    except StructKDError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder without permission: the message names the file
        return _fail(_said(error, tokens), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same line again to continue", 130)


def main() -> None:
    """Entry point of the `structkd` command."""
    sys.exit(run(sys.argv[1:]))


def _resolved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The flat table of flags that --config would read: configuration dataclasses are flags side by side."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Common):
            continue
        flat |= plain(value) if dataclasses.is_dataclass(value) else plain({name: value})
    return flat


def _config_files(tokens: Sequence[str]) -> list[Any]:
    path = _given(tokens, "--config")
    return [] if path is None else [_toml(path)]


def _given(tokens: Sequence[str], flag: str) -> str | None:
    """The first value that a line gives a flag."""
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        if token == flag:
            return following
        if token.startswith(f"{flag}="):
            return token.removeprefix(f"{flag}=")
    return None


def _toml(path: str) -> Toml:
    return Toml(path, must_exist=True, use_commands_as_keys=False)


def _help_of(tokens: Sequence[str]) -> str:
    """Where the flags of the command stand that a line meant."""
    words = list(itertools.takewhile(lambda token: not token.startswith("-"), tokens))[:2]
    while words and not _known(words):
        words.pop()
    return f"See {' '.join(['structkd', *words])} --help."


def _known(words: Sequence[str]) -> bool:
    """Whether these words name a command or a group of them."""
    try:
        found, _, unused = app.parse_commands(list(words))
    except CycloptsError:
        return False
    return len(found) == len(words) and not unused


def _said(error: OSError, tokens: Sequence[str]) -> str:
    """Which file (a failed write names none: where the line writes to), what the system says, what to do."""
    message = f"{error.filename or _given(tokens, '--out') or 'file system'}: {error.strerror or error}"
    if error.errno != errno.ENOSPC:
        return message
    return f"{message}. Free some space, or give --out another disk; what was committed stays for the same line."


def _fail(message: str, status: int) -> int:
    print("structkd: " + " ".join(message.split()), file=sys.stderr)
    return status
