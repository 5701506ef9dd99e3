"""`seal-jax`: finds the command that is asked for, runs it, and says in a line what went wrong."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence

from seal_jax.extensions import Found
from seal_jax.hosts.preemption import Stopped, listening

# The modules of commands.
COMMANDS = Found("commands", base="main", attribute=None)
# Those that write a run's folder: the same command goes on where it was ended.
RESUMED = ("train", "eval", "tune", "continual")


def make_parser(names: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser that knows these commands."""
    parser = argparse.ArgumentParser(
        prog="seal-jax",
        description="Language models that write their own training text, and learn to write it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        command = COMMANDS[name]
        command.add_arguments(
            commands.add_parser(
                name,
                help=command.HELP,
                description=command.HELP,
                epilog=command.EXAMPLES,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad input is one message on stderr and code 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    name = words[0] if words else ""
    try:
        with listening() if name in RESUMED else contextlib.nullcontext():
            # One command need not wait for the import of the others.
            arguments = make_parser([name] if name in COMMANDS else COMMANDS).parse_args(words)
            return COMMANDS[name].run(arguments)
    except Stopped as stopped:
        print(f"seal-jax {name}: {stopped}: the same command resumes the run", file=sys.stderr)
        return 0
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("SEAL_JAX_TRACEBACK"):
            raise
        print(f"seal-jax {name}: {error}", file=sys.stderr)
        _end_others(str(error), 2)
        return 2
    except KeyboardInterrupt:
        resumes = ": the same command resumes the run" if name in RESUMED else ""
        print(f"seal-jax {name}: interrupted{resumes}", file=sys.stderr)
        _end_others("interrupted", 130)
        return 130
    except Exception as error:
        traceback.print_exc()
        _end_others(f"{type(error).__name__}: {error}", 1)
        return 1


def _end_others(message: str, code: int) -> None:
    if "seal_jax.hosts.failure" in sys.modules:  # else nobody has been looked for
        from seal_jax.hosts.failure import end_others

        end_others(message, code)


if __name__ == "__main__":
    sys.exit(main())
