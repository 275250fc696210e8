"""The data plane: HTTP requests come in, the dialect's bytes leave. It identifies, validates, hands on and renders; it
never reaches storage and holds no state that a restart would lose.
"""
