"""The two commands: ``magi-agent``, the service, and ``magictl``, its client."""
