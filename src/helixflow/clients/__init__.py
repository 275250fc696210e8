"""Typed clients to our own services, with their caches and watches. Errors leave as `HelixError`.

They know a service's contract, never its insides, and keep working on what they knew while it is away.
"""
