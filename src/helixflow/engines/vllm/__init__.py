"""vLLM as a process of ours: how it is started, and calls on its OpenAI-compatible API. vLLM itself is not imported."""
