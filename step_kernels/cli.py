"""What the command lines share."""

from __future__ import annotations

import argparse


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")
