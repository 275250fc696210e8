"""One typed, frozen settings tree: TOML < environment < flags. Read once, never printed with its secrets."""
