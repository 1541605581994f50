"""Benchmarks: fastcls beside its peers, on the same batches in the same run. See README.md in this folder."""
