"""Keeps the libraries' chatter off the screen: it goes to the run's log file.

What would reach the screen otherwise: Python warnings, the libraries' log handlers, their progress
bars, and lines that native code prints while it is imported.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.collector import collector_off

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # or tokenizers warn whenever a process forks
    "TQDM_DISABLE": "1",
}
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Inside, warnings and log records of all libraries are appended to `log`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    handler = logging.FileHandler(log, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with native_output(log), collector_off():
                import_libraries()
                gc.freeze()  # or each collection goes through all that the libraries brought
            _take_handlers()
            yield
    finally:
        logging.captureWarnings(False)
        root.handlers, root.level = before
        handler.close()


def import_libraries() -> None:
    """Import what warns while it is imported."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread to watch over bars that nobody sees


def _take_handlers() -> None:
    """Let the records of libraries with handlers of their own rise to the root logger."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for name in list(logging.Logger.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if _writes_to_screen(handler):
                logger.removeHandler(handler)
                logger.propagate = True


def _writes_to_screen(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


@contextmanager
def native_output(log: Path) -> Iterator[None]:
    """Inside, what is written to the process's own stdout and stderr is appended to `log`.

    By file descriptor, so that native code is caught too. Nothing else may print meanwhile.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, target)
            os.close(copy)
