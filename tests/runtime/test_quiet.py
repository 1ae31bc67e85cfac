"""The libraries' chatter goes to the log and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import logging, os, sys, warnings
from pathlib import Path
from runtime.quiet import native_output, quiet
with quiet(Path(sys.argv[1])):
    warnings.warn("a python warning", FutureWarning)
    logging.getLogger("somelib.part").warning("a logged warning")
    from transformers.utils import logging as theirs
    theirs.get_logger("transformers.models").warning("a transformers warning")
    from diffusers.utils import logging as theirs
    theirs.get_logger("diffusers.models").warning("a diffusers warning")
    with native_output(Path(sys.argv[1])):
        os.write(2, b"a native line\\n")
    print("the answer")
    print("progress", file=sys.stderr)
logging.getLogger("after").warning("back on the screen")
"""


def test_only_what_we_print_reaches_the_screen(tmp_path):
    log = tmp_path / "run.log"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(log)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the answer\n"
    assert done.stderr == "progress\nback on the screen\n"
    text = log.read_text()
    for expected in (
        "a python warning",
        "WARNING somelib.part: a logged warning",
        "a transformers warning",
        "a diffusers warning",
        "a native line",
    ):
        assert text.count(expected) >= 1, expected
