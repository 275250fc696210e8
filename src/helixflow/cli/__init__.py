"""The `helixflow` command: what enters are words on a command line, what leaves are lines for people or JSON for
programs and an exit code. It holds no logic of the service: every command is a thin client of another room.
"""
