"""Talks to upstream servers: HTTP/1.1 with keep-alive pools, TLS, and the framing of server-sent events.

In comes a request whose head was built beforehand, out go a status, headers and the body's pieces as they arrive, or a
`HelixError`. Knows nothing of models, dialects or retries across deployments; never decodes a body; never reveals an
upstream's address in an error message (details travel in the chained cause).
"""
