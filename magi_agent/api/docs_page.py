"""The page that shows the OpenAPI document: one answer with all in it, which fetches nothing from any other host."""

import base64
import hashlib
from importlib.resources import files
from typing import Final

from aiohttp import web

_STYLE: Final = "/* docs.css */"
_SCRIPT: Final = "/* docs.js */"


class DocsPage:
    """The page, joined from its three files once."""

    def __init__(self) -> None:
        here = files(__package__)
        html, style, script = (here.joinpath(name).read_text("utf-8") for name in ("docs.html", "docs.css", "docs.js"))
        self._body = html.replace(_STYLE, style).replace(_SCRIPT, script).encode()
        self._policy = (
            f"default-src 'none'; connect-src 'self'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def answer(self) -> web.Response:
        """The page, with a policy that holds the browser to it."""
        return web.Response(
            body=self._body,
            content_type="text/html",
            charset="utf-8",
            headers={"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"},
        )


def _digest(text: str) -> str:
    """How a content security policy names an inline style or script: https://www.w3.org/TR/CSP3/#source-list-syntax."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
