"""The API against its own OpenAPI document: thousands of requests that it allows, and thousands that it forbids.

No answer may be a server error, have a status or a header that is not in the document, or a body of another shape; and
what breaks the schema must be refused. ``MAGI_TEST_EXAMPLES`` asks more of each operation than the usual few, and
``FUZZ_SEED`` something else.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import locations
import pytest

from tests.agent_process import AgentProcess, ended
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
EXAMPLES = os.environ.get("MAGI_TEST_EXAMPLES", "20")
SEED = os.environ.get("FUZZ_SEED") or "20"
CONFIGURATION = """
request-timeout = 90.0

[generation]
# Tokens that nobody made would be 401, whatever else is asked.
with-security-parameters = false

[checks.negative_data_rejection]
# What is too much to be read is refused before it is looked at.
expected-statuses = [400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422]

# Ids that there are, or all that is ever seen is ModelNotFound.
[[operations]]
include-path-regex = "/servers/\\\\{modelId\\\\}|/\\\\{modelId\\\\}$|/(tier|thinking|enabled|port)$"
parameters = { modelId = "conform-runs" }

# A model that cannot be started: hardly any of these settings would be good for one that can.
[[operations]]
include-path-regex = "/settings$"
parameters = { modelId = "conform-cut" }

[[operations]]
include-path-regex = "/profiles/\\\\{name\\\\}"
parameters = { name = "conform" }

# There, 503 is no failure.
[[operations]]
include-path-regex = "^/health/(auto$|models/|tiers/)"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
"""


@pytest.mark.timeout(300)
def test_every_answer_is_in_the_document(
    tmp_path: Path,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    toy_model(models / "conform-runs.gguf")
    cut = toy_model(models / "conform-cut.gguf")
    os.truncate(cut, cut.stat().st_size - 5000)
    port, _ = unused_ports()
    agent = AgentProcess(
        tmp_path,
        models,
        unused_ports(4),
        llama_server,
        {
            "MAGI_SYSTEMD_SCOPE": "user",
            "MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal),
            "MAGI_TCP": f"127.0.0.1:{port}",
            "MAGI_TCP_ACCESS": "full",
        },
    )
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    with ended(agent, "magi-llama-conform-*.service"):
        agent.start()
        agent.must("POST", "/api/models/profiles", {"name": "conform", "enabledModels": ["conform-runs"]})
        asked = subprocess.run(
            [
                locations.VENV / "bin" / "schemathesis",
                "--config-file", tmp_path / "schemathesis.toml",
                "run", f"http://127.0.0.1:{port}/api/openapi.json",
                "--checks", ",".join(CHECKS),
                # These do not end by themselves, or need not.
                "--exclude-path", "/api/events",
                "--exclude-path", "/api/models/servers/{modelId}/logs",
                # What answers there is a llama-server.
                "--exclude-path-regex", "^/(?!api/|health/|metrics).|^/api/proxy/|^/metrics/models/",
                "--max-examples", EXAMPLES,
                "--seed", SEED,
                "--phases", "examples,coverage,fuzzing",
                "--warnings", "off",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=110 + 5 * int(EXAMPLES), check=False,
        )  # fmt: skip
        said = "\n".join(line[:500] for line in asked.stdout.splitlines())
        assert asked.returncode == 0, f"{said}\n{asked.stderr[-2000:]}"
        generated = re.search(r"(\d[\d,]*) generated", said)
        assert generated, said
        assert int(generated[1].replace(",", "")) > 500, said
        assert agent.process is not None
        assert agent.process.poll() is None
        assert "met a defect" not in agent.log.read_text()
