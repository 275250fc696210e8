"""gRPC between our own processes: mutual TLS, who may call what, and how an error travels.

What enters are identities, policies, addresses and `HelixError`s; what leaves are channels, servers and the same
`HelixError`s on the other side. It never knows what a service does; the stubs in `generated/` come from proto/.
"""
