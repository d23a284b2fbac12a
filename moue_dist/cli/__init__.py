"""The command line: `moue COMMAND`, a file a command. Heavy modules load only where a command needs them."""

from moue_dist.cli.main import main

__all__ = ["main"]
