"""MAGI Agent: local language models on a GPU host, each in a systemd unit of its own."""

__version__ = "0.1.0"
