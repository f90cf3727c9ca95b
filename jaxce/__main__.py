"""`python -m jaxce`: whether the losses are right on this machine, and what of a step fits into its memory."""

import sys


def main() -> int:
    """The exit status."""
    try:
        from jaxce._report.command import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(f'python -m jaxce: {missing} is missing: pip install "jaxce[report]"', file=sys.stderr)
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
