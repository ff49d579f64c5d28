"""What an operator can set: the settings, their table, the file ``agent.toml``, and how all sources are joined."""
