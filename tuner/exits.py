"""Exit codes: what a script may rely on."""

from typing import Final

DONE: Final = 0
FAILED: Final = 1  # the run failed: out of memory, non-finite loss, input or output
REFUSED: Final = 2  # the command line or the recipe is wrong, nothing was started
UNFIT: Final = 3  # the recipe is fine, this machine cannot run it
BUG: Final = 70  # ours; EX_SOFTWARE of sysexits.h
STOPPED: Final = 130  # Ctrl-C, after a checkpoint
