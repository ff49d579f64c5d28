"""The llama-servers: what should run, what runs, and the way from one to the other."""
