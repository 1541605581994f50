"""Benchmark suites that compare fastcls with its peers: ``fastcls bench``, and ``pytest benchmarks/`` in a checkout."""
