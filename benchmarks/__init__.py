"""Benchmarks run in a process that is prepared like that of ``python -m owl``."""

from owl.process import prepare_process

prepare_process()
