"""Generated from proto/helixflow/auth/v1; never edited."""
