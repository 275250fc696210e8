"""The API dialects: typed, validated requests in; the bytes of answers and of SSE events out. No I/O, no engines."""
