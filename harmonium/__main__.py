"""The command `harmonium`, and `python -m harmonium`."""

import sys


def main() -> int:
    """Run one command and return its exit code; a Ctrl-C while modules load leaves no traceback either."""
    try:
        from harmonium.cli import EXIT_INTERRUPTED
        from harmonium.cli import main as run
    except KeyboardInterrupt:
        return 130  # EXIT_INTERRUPTED, which may not be there yet
    assert EXIT_INTERRUPTED == 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
