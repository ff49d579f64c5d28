"""What a model needs of the host's and the GPUs' memory: estimated before the start, reported and measured after it.

"Memory" means anonymous memory plus mapped weights: what a server has allocated, and the pages of its model files
that it has mapped. Program code and shared libraries are not counted; of other files' page cache nothing is.
"""
