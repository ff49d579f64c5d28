"""Where the agent's own log goes: structured records to the journal, plain text to a terminal.

In the journal, a record's ``extra`` keys that begin with ``magi_`` become fields of their own (``MAGI_MODEL``, which
the servers' own lines carry too, so that ``journalctl MAGI_MODEL=<id>`` shows both sides; ``MAGI_REQUEST_ID``; and of
what somebody asked over the API ``MAGI_CALLER`` and ``MAGI_TOKEN``).
"""

import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Final

from logging_journald import JournaldTransport, check_journal_stream

from magi_agent.request_id import RequestIdFilter

IDENTIFIER: Final = "magi-agent"
CHANGES: Final = "magi_agent.api.changes"
"""The logger of who changed what over the API: such records are written at every level of the log."""
HISTORY: Final = "magi_agent.history"
"""The logger of what happened to the servers: its records go to the journal wherever the rest of the log goes."""
_OURS: Final = "magi_"
_MESSAGE_ID: Final = "magi_message_id"
# Priorities of syslog(3).
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


class JournalHandler(logging.Handler):
    """Sends records to journald by its native protocol."""

    def __init__(self, transport: JournaldTransport | None = None, identifier: str = IDENTIFIER) -> None:
        super().__init__()
        self._identifier = identifier
        self._transport = transport or JournaldTransport()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; on failure it goes to standard error, as with every handler."""
        try:
            self._transport.send(_fields(record, self._identifier))
        except OSError:
            self.handleError(record)


class _LineFormatter(logging.Formatter):
    """One line a record, whatever names other people gave their files; only a traceback takes more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the base class's name
        if not record.message.isprintable():
            record.message = "".join(
                letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode()
                for letter in record.message
            )
        return super().formatMessage(record)


def _fields(record: logging.LogRecord, identifier: str) -> Iterator[tuple[str, object]]:
    message = record.getMessage()
    if record.exc_info:
        # As one entry: journalctl shows it whole, and nothing of it can pass for another line.
        message = "\n".join([message, "".join(traceback.format_exception(*record.exc_info)).rstrip()])
    yield "MESSAGE", message.encode(errors="replace").decode()
    yield "PRIORITY", next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)
    yield "SYSLOG_IDENTIFIER", identifier
    yield "LOGGER", record.name
    yield "CODE_FILE", record.pathname
    yield "CODE_LINE", record.lineno
    yield "CODE_FUNC", record.funcName
    for name, value in vars(record).items():
        if name.startswith(_OURS) and value is not None:
            yield "MESSAGE_ID" if name == _MESSAGE_ID else name.upper(), str(value).encode(errors="replace").decode()


def set_up_logging(level: str, identifier: str = IDENTIFIER) -> None:
    """Send this process's log where its standard error leads: to the journal, or as text to whoever reads it.

    In the journal, ``identifier`` is the name of who writes (``SYSLOG_IDENTIFIER``).
    """
    handler: logging.Handler
    if check_journal_stream():
        handler = JournalHandler(identifier=identifier)
    else:
        handler = logging.StreamHandler(sys.stderr)
        times = "%H:%M:%S" if sys.stderr.isatty() else None
        handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)-7s %(message)s", times))
    handler.addFilter(RequestIdFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_log_level(level)
    for name in (CHANGES, HISTORY):
        logging.getLogger(name).setLevel(logging.INFO)
    if not isinstance(handler, JournalHandler):
        logging.getLogger(HISTORY).handlers[:] = _journal_handlers(identifier)
    logging.captureWarnings(capture=True)


def _journal_handlers(identifier: str) -> list[logging.Handler]:
    """A handler that writes to the journal, where there is one."""
    try:
        return [JournalHandler(identifier=identifier)]
    except OSError:
        return []


def set_log_level(level: str) -> None:
    """Have everything of the agent from ``level`` upwards logged: debug, info, warning or error."""
    logging.getLogger("magi_agent").setLevel(level.upper())
