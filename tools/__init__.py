"""Programs for people who work on HelixFlow: what they write is committed, nothing here is installed."""
