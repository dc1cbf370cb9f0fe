"""The command line: one file per verb, errors without tracebacks, heavy imports only once a verb runs.

Exit codes: 0 done, 1 a fault (the worker's, the disk's), 2 misuse (option, file, model), 130 interrupted,
143 ended by SIGTERM. What another library raises is told by class and place alone, see `foreign.py`.
"""

import importlib
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

import typer

from obfuscatune import __version__
from obfuscatune.cli.foreign import quieted, without_content
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.protocol.memory import keep_freed_memory
from obfuscatune.protocol.waiting import WAITING

VERBS = (
    "demo",
    "finetune",
    "generate",
    "serve",
    "connect",
    "worker",
    "inspect",
    "doctor",
    "bench",
    "evaluate",
    "lm-eval",
    "audit",
)
# Verbs with verbs of their own: modules with HELP and COMMANDS, a map of name to (function, epilog).
GROUPS = ("party", "identity", "enclave", "seal", "sealed", "job", "log", "attest", "reproduce")

EPILOG = "Examples:\n\nobfuscatune demo\n\nobfuscatune finetune --help"

# typer keeps the classes of click that it raises to itself, in another module from version to version.
_COMMAND_LINE_ERROR: Any = typer.BadParameter.__mro__[2]


def build_app() -> typer.Typer:
    """Return the application with all verbs; imports their modules, which import neither torch nor transformers."""
    app = typer.Typer(
        name="obfuscatune",
        help="Fine-tune and run a private language model with its large layers keyed onto an untrusted accelerator.",
        epilog=EPILOG,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context, version: bool = typer.Option(False, "--version", help="print the version")
    ) -> None:
        if version:
            typer.echo(f"obfuscatune {__version__}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for verb in VERBS:
        module = importlib.import_module(f"obfuscatune.cli.{verb.replace('-', '_')}")
        app.command(verb, epilog=module.EPILOG, context_settings=getattr(module, "CONTEXT", None))(module.command)
    for name in GROUPS:
        module = importlib.import_module(f"obfuscatune.cli.{name}")
        group = typer.Typer(help=module.HELP, no_args_is_help=True, rich_markup_mode="rich")
        for verb, (function, epilog) in module.COMMANDS.items():
            group.command(verb, epilog=epilog)(function)
        app.add_typer(group, name=name)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the console script's entry."""
    for name, value in WAITING.items():  # before torch is imported
        os.environ.setdefault(name, value)
    keep_freed_memory()
    # A core dump would write keys and data to the disk, or hand them to the machine's crash reporter.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with warnings.catch_warnings(), quieted():
            warnings.showwarning = _show_warning
            code: Any = build_app()(args=arguments, prog_name="obfuscatune", standalone_mode=False)
    except ObfuscatuneError as error:
        _complain(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except _COMMAND_LINE_ERROR as error:
        context = getattr(error, "ctx", None)
        hint = f"\nhint: {context.command_path} --help" if context is not None else ""
        _complain(error.format_message() + hint)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        _complain(without_content(error))
        return 1
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    """Print an error on a line of its own, where a progress bar is still open too."""
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(f"error: {message}", file=sys.stderr)
    else:
        bars.tqdm.write(f"error: {message}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Other packages' deprecations are for their callers, and a user of the command line is none.
    if not issubclass(category, DeprecationWarning | FutureWarning):
        print(f"warning: {message}", file=sys.stderr)
