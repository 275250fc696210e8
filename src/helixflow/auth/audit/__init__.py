"""The audit log: who did what to what, chained by hashes for each organisation. Append-only; secrets never enter it."""
