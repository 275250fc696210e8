"""Stubs generated from proto/ by `make generate`; never edited."""
