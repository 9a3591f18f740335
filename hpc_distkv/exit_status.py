"""Statuses with which a process leaves, beside those of errors (`ExplainedError.exit_code`)."""

import os

STOPPED_STATUS = os.EX_TEMPFAIL
"""Rows are left: the same command is to be run again (sysexits.h: 75)."""
INTERRUPTED_STATUS = 130
"""Ended by Ctrl-C, as shells have it."""
