"""What a GGUF file says of itself, read from its header alone.

``header`` reads, ``reading`` makes the facts of ``facts`` out of it.
"""
