"""An answer in two stages: a draft is had from one model, and another one's answer is made with it.

A draft is never worth an error: where there is none, for whatever reason, the second stage is asked what the client
asked, and nothing else. Each stage is a request of its own to its model: it waits for its turn, is counted there, and
leaves before the next one enters, so that memory for one model is enough.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from magi_agent.errors import MagiError
from magi_agent.gateway.awaited import AwaitedAnswer
from magi_agent.gateway.relay import RelayedAnswer, ServerAnswer, ServerFailed, ServerUnreachable
from magi_agent.gateway.two_stage import Drafter, DraftReader, draft_body, draft_event, refined_body
from magi_agent.registry.model import Model

DRAFT_HEADER: Final = "X-Magi-Draft-Model"
"""The id of the model that was asked for a draft."""
_LONGEST: Final = 120.0
"""Seconds for a draft, from the moment it is asked for; what there is by then is used."""
_MOST: Final = 256 * 1024
"""Bytes of a draft."""
_LARGE: Final = 64 * 1024
"""Bytes of a body from which on it is read in a thread."""
_OK: Final = 200
_FIRST_REFUSAL: Final = 400

Ask = Callable[[Model, bytes], Awaitable[ServerAnswer]]
"""Asks a model with a body, once it is its turn."""
Named = Callable[[Model], bytes]
"""What the client asked, with a model's name in it."""
Another = Callable[[Model], Model | None]
"""One that can be asked in the place of a model whose server is gone."""
Show = Callable[[str], Awaitable[None]]
"""Takes a piece of the draft."""


class TwoStages:
    """What two models make of one request."""

    def __init__(self, model: Model, drafter: Drafter, *, named: Named, ask: Ask, another: Another) -> None:
        """``model`` is the second stage's."""
        self.model = model
        self.drafter = drafter
        self._named = named
        self._body = named(model)
        self._ask = ask
        self._another = another
        self._deadline = asyncio.get_running_loop().time() + _LONGEST

    async def response(self, *, wants_stream: bool, has_to_wait: bool) -> web.StreamResponse | None:
        """What the client gets; ``None`` where there is no draft, and nothing that the second stage was asked.

        ``has_to_wait``: whether the draft's model is not there yet, so that a stream begins without it.
        """
        response: web.StreamResponse
        if wants_stream:
            begun = None if has_to_wait else await self._begun()
            if not (begun or has_to_wait):
                return None
            response = StagedAnswer(self, begun)
        else:
            begun = await self._begun()
            draft = await self.draft(begun, _kept_back) if begun else ""
            if not draft:
                return None
            response = RelayedAnswer(await self.refined(draft))
        response.headers[DRAFT_HEADER] = self.drafter.model.model_id
        return response

    async def staged(self, begun: ServerAnswer | None, show: Show) -> ServerAnswer:
        """The second stage's answer, once the draft is made, which has ``begun`` or is asked for now.

        Raises what the second stage does.
        """
        begun = begun or await self._begun()
        draft = await self.draft(begun, show) if begun else ""
        if draft:
            # What the second one thinks follows it, in the same place.
            await show("\n\n")
        return await self.refined(draft)

    async def draft(self, begun: ServerAnswer, show: Show) -> str:
        """The draft, each piece of which is shown as it comes: as far as it came, and empty where it says nothing."""
        said: list[str] = []
        size, reader = 0, DraftReader()
        with begun, suppress(ServerFailed, TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                while size < _MOST and (piece := await begun.next_piece()):
                    if text := reader.read(piece):
                        said.append(text)
                        size += len(text.encode())
                        await show(text)
        draft = "".join(said)
        return draft if draft.strip() else ""

    async def refined(self, draft: str) -> ServerAnswer:
        """The second stage's answer. Raises what asking a model does.

        It is another model's where nobody takes connections at the server of the one that was chosen; where there is no
        other, that one is waited for.
        """
        try:
            return await self._refined(draft)
        except ServerUnreachable:
            self.model = self._another(self.model) or self.model
            self._body = self._named(self.model)
            return await self._refined(draft)

    async def _refined(self, draft: str) -> ServerAnswer:
        if draft:
            asked = await self._worked_out(partial(refined_body, self._body, draft))
            answer = await self._ask(self.model, asked)
            if answer.status < _FIRST_REFUSAL:
                return answer
            # The draft may be at fault: it makes the conversation longer than the model can take, for one.
            with answer, suppress(ServerFailed):
                await answer.read()
        return await self._ask(self.model, self._body)

    async def _begun(self) -> ServerAnswer | None:
        """The draft's stream, of which nothing is read yet; ``None`` where there is none."""
        with suppress(MagiError, TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                model, most = self.drafter.model, self.drafter.max_tokens
                asked = await self._worked_out(partial(draft_body, self._body, model.model_id, most))
                answer = await self._ask(model, asked)
                if answer.status == _OK and answer.is_stream:
                    return answer
                with answer:
                    await answer.read()
        return None

    async def _worked_out(self, work: Callable[[], bytes]) -> bytes:
        return await asyncio.to_thread(work) if len(self._body) > _LARGE else work()


class StagedAnswer(AwaitedAnswer):
    """A stream of server-sent events: the draft as it is made, and then all that the second stage's server says."""

    def __init__(self, stages: TwoStages, begun: ServerAnswer | None) -> None:
        """``begun`` is the draft's stream, where it is there already."""
        sign = f"the answer of {stages.model.model_id} is not ready yet"
        super().__init__(stages.model.model_id, lambda: stages.staged(begun, self._show), sign=sign)
        self._begun = begun
        self._answers_model_id = stages.model.model_id
        self._draft_id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the headers, signs of life, the draft and the answer."""
        try:
            return await super().prepare(request)
        finally:
            if self._begun is not None:
                # Also where the client left before it was read: its model is in use until then.
                self._begun.close()

    async def _show(self, text: str) -> None:
        await self.write(draft_event(text, self._draft_id, self._created, self._answers_model_id))


async def _kept_back(_: str) -> None:
    """Show nobody the draft."""
