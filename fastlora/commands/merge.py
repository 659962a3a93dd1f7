"""`fastlora merge`: several adapters with strengths in one file."""

from __future__ import annotations

import argparse

from fastlora.commands import CommandError

HELP = "several adapters with strengths in one file"
DESCRIPTION = HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    raise CommandError("not there yet")
