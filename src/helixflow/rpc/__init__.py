"""gRPC between our own processes: channels and servers on Unix sockets, and how an error travels over them.

What enters are paths and `HelixError`s, what leaves are channels, servers and the same `HelixError`s on the other side.
It never knows what a service does; the stubs in `generated/` come from proto/.
"""
