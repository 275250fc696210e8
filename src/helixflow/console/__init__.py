"""The admin REST API: JSON requests under /api/v1 come in from the gateway, one RPC of the auth service goes out for
each, and its answer leaves as JSON or as a problem document. It decides nothing about who may do what, reaches no
storage and keeps no state.
"""
