"""The edge to the host's kernel: who listens where."""
