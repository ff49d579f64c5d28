"""Why a file's GGUF header could not be read.

::

    GgufError
    ├── NotGguf                something else, or no regular file
    ├── UnsupportedHeader      GGUF, in a version or byte order that llama-server does not load either
    ├── MalformedHeader        damaged, or beyond the limits of the reader
    └── TruncatedHeader        the file ends inside its header: a copy or a download in progress, or a cut one
        └── UnwrittenHeader    zeros stand where the header goes on: space is reserved, data is not there yet

What the operating system says (no permission, no such file, an input error) stays an ``OSError``.
"""


class GgufError(Exception):
    """The header cannot be read. ``str()`` of it is one sentence for a person.

    ``offset`` is the byte of the file at which reading stopped.
    """

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


class NotGguf(GgufError):
    """The file does not begin as a GGUF file does, or it is not a regular file."""


class UnsupportedHeader(GgufError):
    """A GGUF file of another byte order, or of a version that nobody writes any more or yet."""


class MalformedHeader(GgufError):
    """The header contradicts itself or the format, or claims more than the reader allows."""


class TruncatedHeader(GgufError):
    """The header is sound as far as it goes, and the file ends before it does."""


class UnwrittenHeader(TruncatedHeader):
    """The file has its size already, and zeros where the header begins or goes on."""
