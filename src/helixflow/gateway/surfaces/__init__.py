"""One module per API surface: which paths it has and how its errors look."""
