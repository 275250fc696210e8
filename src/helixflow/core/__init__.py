"""Values and errors that every room shares: no I/O, no wire format, no state."""
