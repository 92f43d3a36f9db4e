"""The command line. It parses, calls the functions of the package, and prints; nothing else."""

import sys
from io import TextIOWrapper

from antidiffusion.cli import attacking, benchmarking, protecting, reporting
from antidiffusion.cli.shared import app
from antidiffusion.process import stop_as_by_ctrl_c

__all__ = ["app", "attacking", "benchmarking", "main", "protecting", "reporting"]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text in the terminal's encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stop_as_by_ctrl_c()
    app()
