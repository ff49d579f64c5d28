"""How a model's server is run, where people have a say: one set of settings for the wire, the files and the start."""
