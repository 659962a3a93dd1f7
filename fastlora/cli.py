"""The command `fastlora`. Subcommands import what they need when they run."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastlora.adapters import AdapterError
from fastlora.commands import (
    CommandError,
    convert,
    extract,
    fold,
    inspect,
    merge,
    train_svdiff,
    verify,
)
from fastlora.formats.files import FormatError

# Commands about adapter files: each module has HELP, DESCRIPTION, add_arguments and run.
FILE_COMMANDS = {
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "extract": extract,
    "fold": fold,
    "verify": verify,
}

# Modules of optional packages, and what to install for them.
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="fastlora", description="Adapters of diffusion models, fused."
    )
    main.add_argument("--version", action="store_true", help="print the version and stop")
    main.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, for bug reports"
    )
    commands = main.add_subparsers(dest="command", title="commands")

    demo = commands.add_parser(
        "demo",
        help="train adapters of a small model, sample, verify, time; write a report",
        description="Trains a thickness slider and a subject on a small diffusion model, samples "
        "with them, verifies and times them, and writes report.html with the pictures. Uses the "
        "GPU where there is one; at most 3 minutes on two CPU cores. Needs the extra demo: "
        "pip install '.[demo]' in fastlora's folder.",
    )
    demo.add_argument(
        "part",
        nargs="?",
        choices=("svdiff",),
        help="svdiff: spectral shifts alone, against LoRA and full fine-tuning, of two subjects,"
        " and for editing; writes svdiff.html; about three minutes on two idle cores",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out"), help="folder to write (default: out)"
    )
    demo.add_argument("--seed", type=seed, default=0, help="seed of everything random (default: 0)")
    demo.add_argument(
        "--json", action="store_true", help="print JSON, and what is said meanwhile on stderr"
    )

    doctor = commands.add_parser(
        "doctor",
        help="what was built, which devices, what is missing and how to get it",
        description="Reports what was built, which devices and packages there are, checks every "
        "operator against its reference, and says what to do. Exit code 1 if something is wrong.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")

    train = commands.add_parser(
        "train",
        help="train an adapter from pictures",
        description="Trains an adapter from pictures by a published method.",
    )
    methods = train.add_subparsers(dest="method", title="methods", required=True)
    svdiff = methods.add_parser(
        "svdiff",
        help="shifts of singular values (SVDiff)",
        description="Teaches a model a subject from a few pictures by shifts of the singular values"
        " of its weights (SVDiff, arXiv 2303.11305) and writes them to a file of at most about 2"
        " MB that fastlora.load reads. A run that is stopped goes on with --resume and the same"
        " options.",
    )
    train_svdiff.add_arguments(svdiff)

    for name, module in FILE_COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
    return main


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2^63 - 1, got {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        return train_svdiff.run(arguments)
    if arguments.command in FILE_COMMANDS:
        return FILE_COMMANDS[arguments.command].run(arguments)
    if arguments.command == "demo" and arguments.part == "svdiff":
        from fastlora.demo.svdiff import main

        return main(arguments.out, arguments.seed, as_json=arguments.json)
    if arguments.command == "demo":
        from fastlora.demo import main

        return main(arguments.out, arguments.seed, as_json=arguments.json)
    from fastlora.doctor import main

    return main(as_json=arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. 0: well; 1: it found a problem; 2: an error, said in one line."""
    arguments = parser().parse_args(argv)
    if arguments.version:
        from fastlora import __version__

        print(f"fastlora {__version__}")
        return 0
    if arguments.command is None:
        parser().print_help()
        return 2
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nfastlora: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastlora doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandError, AdapterError, FormatError, ModuleNotFoundError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"fastlora {arguments.command}: {explain(error)}", file=sys.stderr)
        return 2


def explain(error: Exception) -> str:
    """An expected failure in one line, with the way out where it is known."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        if module == "fastlora":  # part of this package: a broken installation
            return f"{error}; in fastlora's folder: pip install --force-reinstall --no-deps ."
        return f"{module} is not installed; try: pip install {PACKAGES.get(module, module)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
