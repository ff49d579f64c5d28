"""The id of the request that is being worked on, for the answer and for every log record written meanwhile."""

import logging
import os
import re
from contextvars import ContextVar
from typing import Final

_SANE: Final = re.compile(r"[A-Za-z0-9._:+=@/-]{1,128}")

REQUEST_ID: Final[ContextVar[str | None]] = ContextVar("REQUEST_ID", default=None)
"""Set for as long as a request is handled, and in the tasks that its handler starts."""


def request_id_from(offered: str | None) -> str:
    """The caller's own id, if it is a sane token; else a new one."""
    if offered is not None and _SANE.fullmatch(offered):
        return offered
    return os.urandom(8).hex()


class RequestIdFilter(logging.Filter):
    """Puts the request's id on log records, as ``magi_request_id``; for a handler, where it sees all of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mark the record and let it pass."""
        if not hasattr(record, "magi_request_id"):
            record.magi_request_id = REQUEST_ID.get()
        return True
