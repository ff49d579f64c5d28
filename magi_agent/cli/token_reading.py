"""The token that ``magictl`` sends: from a file, as whatever stands on a command line or in an environment shows."""

import os

from magi_agent.tokens import is_secret

_MOST_BYTES = 4096


def read_token(path: str) -> str:
    """Return the token in a file that holds nothing else. Raises ``ValueError``, in whose sentence nothing of it is."""
    try:
        with open(os.path.expanduser(path), "rb") as file:  # noqa: PTH111, PTH123  # /dev/fd/63 is no path to resolve
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the token file {path} cannot be read: {error.strerror}") from None
    text = content[:_MOST_BYTES].decode(errors="replace").strip()
    if len(content) > _MOST_BYTES or not is_secret(text):
        raise ValueError(
            f"the token file {path} must hold one token and nothing else, as 'magictl token add' printed it"
        )
    return text
