"""Bad input is part of the interface: one line that says what is wrong and what to do, and exit status 2."""
import argparse
import io
import os
import sys


class InputError(Exception):
    """Something the reader can put right: a missing file, an impossible flag, a damaged checkpoint."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with the defaults shown in --help and one line for a wrong flag instead of the whole usage."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (--help lists all flags)")

    def print_help(self, file=None):
        print(self.format_help(), end="", flush=True)   # argparse's own would not say that it cannot be written


def positive(kind):
    """An argparse type: an int or a float above zero."""
    def convert(text):
        number = kind(text)
        if not 0 < number < 2 ** 31:
            raise argparse.ArgumentTypeError(f"{text} is not a number above zero and below 2**31")
        return number
    convert.__name__ = kind.__name__   # what argparse calls it in "invalid int value"
    return convert


def seed(text):
    """An argparse type: a number that every random generator takes."""
    number = int(text)
    if not 0 <= number < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return number


def in_range(name, value, kind, low, high):
    """A setting as a plain int or float, from low to high.

    Numbers of numpy and torch count; True, texts and nan do not.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value   # of one number tolist() is no list
    if type(plain) not in (int, kind) or not low <= plain <= high:
        raise InputError(f"{name} {plain} is not a {'whole ' if kind is int else ''}number from {low} to {high}")
    return plain


def token_ids(ids, vocab_size):
    """A list of int: of a list, or of a one-dimensional array of numpy or torch."""
    try:
        ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    except TypeError:
        raise InputError(f"token ids come as a list, not as {ids!r}") from None
    return [in_range("token id", i, int, 0, vocab_size - 1) for i in ids]


class StandardError(io.FileIO):
    """What it cannot write is lost, for there is nowhere to say so; the work goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams():
    """Let no standard stream end the work by being closed, full or of a narrow encoding."""
    if sys.stderr is not sys.__stderr__:   # a test or a notebook has streams of its own
        return
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The next file that is opened would get its number, and what a compiler says would be written there.
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))
    sys.stdin.reconfigure(errors="surrogateescape")   # see valid_unicode
    sys.stdout.reconfigure(errors="backslashreplace")
    raw = StandardError(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def run(main):
    """Run a script's main(). Bad input, and what the system refuses (room on the disk, permission), end in one line and
    status 2; anything else is our bug and keeps its traceback."""
    open_streams()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(130)
    except BrokenPipeError:   # the reader of our output has left, as in `generate.py | head`
        leave(1)
    except OSError as error:
        print(f"error: {error.filename or 'standard output or a file'}: {error.strerror or error}", file=sys.stderr)
        leave(2)


def leave(status):
    """sys.exit, even if what is left to be printed cannot be."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # Python will try once more
    sys.exit(status)
