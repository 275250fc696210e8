"""Measures HelixFlow against its bars: `python -m benchmarks [--quick] [names…]`; results as a table and as JSON."""
