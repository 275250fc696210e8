"""One module per kind of engine: a call comes in, its answer leaves as the dialect's bytes. Never chooses a deployment,
never starts a process.
"""
