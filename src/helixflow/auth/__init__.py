"""Who may call: keys in, identities out, over gRPC. Secrets leave once, when a key is made, and are never kept.

It never sees an API request: gateways ask for identities and remember them.
"""
