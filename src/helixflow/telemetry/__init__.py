"""Structured logs and metric instruments. What enters are events and numbers; prompts, answers and keys never do."""
