"""llama.cpp: what command starts it, and how calls become generations on its HTTP server. Only `child` loads it."""
