"""Entry point of ``python -m experiments``; what it does is in `experiments.cli`."""

import sys

from experiments.framework.parent import follow_parent


def main(words: list[str] | None = None) -> int:
    """Run the command line; the exit status, 130 after Ctrl-C."""
    follow_parent()
    try:
        from experiments.cli import execute  # here, because it imports for seconds, in which Ctrl-C counts too

        return execute(words)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
