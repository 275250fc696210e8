"""Models and engines of one node: specifications come in, verified files and running replicas leave; no prompts."""
