"""What the subcommands of `fastlora` do, one file each; the command line imports them on demand."""


class CommandError(Exception):
    """What was asked for cannot be done; the command line says it in one line, exit code 2."""
