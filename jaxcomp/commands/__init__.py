"""One file a command: arguments only. What is done with them is in `jaxcomp.job` and below.

Heavy imports are inside the commands, so that `--help` answers at once.
"""
