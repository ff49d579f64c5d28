"""Whether a server that was to keep layers on GPUs does so.

llama-server says nothing of it at its usual verbosity, and what it says at a higher one ("offloaded 2/2 layers to GPU")
it says on a host without any GPU too; its log is in part the model file's words besides. What is certain, and to be had
by an agent that may not look into a server's process: a llama-server that is told by name which GPUs to use ends where
they are not there, and one that is not told uses those that it lists. So only the latter is asked about, once, when it
is ready: by a list that was made after it was started.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from magi_agent.host_facts import HostFacts
from magi_agent.servers.failure import Failure
from magi_agent.servers.launch import model_id_of
from magi_agent.servers.llama_server import devices_of, offload_asked
from magi_agent.systemd.status import UnitStatus

_LOG: Final = logging.getLogger(__name__)
_PATIENCE: Final = 5.0
"""Seconds that a server which is ready waits to be called so."""


class Offload:
    """Looks by what llama-server lists."""

    def __init__(self, host: HostFacts) -> None:
        self._host = host

    async def missing(self, unit: UnitStatus) -> Failure | None:
        """Why no GPU is used though that was asked for; ``None`` where one is, or nobody can tell, or nobody asked."""
        asked = offload_asked(unit.argv, unit.environment)
        if asked is None or devices_of(unit.argv) is not None:
            return None
        binary = Path(unit.argv[0])
        age = max(0.0, time.time() - (unit.exec_main_start_timestamp or 0.0))
        try:
            async with asyncio.timeout(_PATIENCE):
                picture = await self._host.gpus(binary, max_age=age)
        except TimeoutError:
            _LOG.warning("%s: nobody says in time whether it has a GPU", unit.name)
            return None
        if picture.problem or any(gpu.device for gpu in picture.gpus):
            return None
        model_id = model_id_of(unit.name)
        return Failure(
            datetime.now(UTC),
            "no-gpu",
            f"no GPU is used though {asked} asks for it: {binary} lists no device",
            advice=f"magictl host shows why; to have it on the CPU: magictl settings {model_id} n_gpu_layers=0",
            invocation_id=unit.invocation_id or None,
        )
