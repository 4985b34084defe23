"""What the command lines share."""

from __future__ import annotations

import argparse
import os
import sys


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def close_quietly() -> None:
    """For a BrokenPipeError: whoever read stdout is gone, so there is no complaint at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
