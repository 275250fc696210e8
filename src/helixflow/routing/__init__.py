"""From a public model name to an answer: which deployment, which replica, who waits, what is tried again. Never touches
bytes of an answer and never reaches storage.
"""
