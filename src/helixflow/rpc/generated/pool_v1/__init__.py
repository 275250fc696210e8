"""Generated from proto/helixflow/pool/v1; never edited."""
