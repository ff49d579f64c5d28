"""The privileged part, in the system scope: it makes and ends the servers' units for an agent that may not.

Starting a transient unit on the system's manager is as much as being root, and the agent reads model files and HTTP,
which anybody may have written. So the agent asks, and a small process that does nothing else decides:

::

    agent (user magi-agent)                launcher (root, no capabilities, no network)
    ───────────────────────                ────────────────────────────────────────────
    client.RemoteLauncher ──one line of JSON──▶ service ──▶ messages: of the right form?
                                                       ──▶ checks: what the operator's configuration allows?
                          ◀──one line of JSON──        ──▶ servers.launcher.DirectLauncher ──D-Bus──▶ systemd

``docs/launcher.md`` says what an agent that was taken over can and cannot do with it.
"""
