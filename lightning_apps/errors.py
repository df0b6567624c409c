"""Errors that a user can act on are shown as one message; everything else keeps its traceback."""

import os
import re
import sys
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException

DEBUG_VARIABLE = "LIGHTNING_APPS_DEBUG"
FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


class UserError(Exception):
    """Something the user gave is wrong; the message says what, where, and what to do."""


def run_reporting_errors(run: Callable[[], object]) -> int:
    """Run a command and turn errors about what the user gave into one message on stderr.

    With the environment variable LIGHTNING_APPS_DEBUG=1 every error keeps its traceback.

    Args:
        run: The command.

    Returns:
        Exit code: 0, or 1 after such an error.
    """
    if os.environ.get(DEBUG_VARIABLE) == "1":
        run()
        return 0
    try:
        run()
    except (UserError, ValueError, OSError, ImportError, MisconfigurationException, FloatingPointError) as error:
        print(f"error: {message_of(error)}\n({DEBUG_VARIABLE}=1 shows the traceback)", file=sys.stderr)
        return 1
    return 0


def message_of(error: BaseException) -> str:
    """What an error says, without the traceback that one out of a loading process carries in its message."""
    text = str(error)
    if not FROM_WORKER.match(text):
        return text
    header = rf"^(?:\w+\.)*{re.escape(type(error).__name__)}: "
    return re.split(header, text, flags=re.MULTILINE)[-1].rstrip()
