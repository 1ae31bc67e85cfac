"""`python -m tuner`, and the entry point of the `tuner` command."""

import gc
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from tuner.cli import run_command

    code = run_command(sys.argv[1:])
    # Python looks for cycles among all objects when it ends: more than a second with torch loaded.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
