"""The serving configuration and its history: documents come in from operators and edited files, every version is kept,
and gateways and pools are told. Never knows how models are served: rules that it is given check and complete them.
"""
