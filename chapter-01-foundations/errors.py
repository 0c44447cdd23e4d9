"""Bad input is part of the interface: one line that says what is wrong and what to do, and exit status 2."""
import sys


class InputError(Exception):
    """Something the reader can put right: a missing file, an impossible flag, a damaged checkpoint."""


def run(main):
    """Run a script's main(). Bad input ends in one line and status 2; anything else is our bug and keeps its traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
