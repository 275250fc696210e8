"""One module per bar: `run(options) -> list[Result]`. The load runs in the calling process."""
