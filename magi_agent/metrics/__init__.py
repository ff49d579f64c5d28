"""What the agent tells Prometheus: itself, the host, its models, and what each ready server says of itself."""
