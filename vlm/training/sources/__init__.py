"""Where batches come from. Every source gives the same global batches to any number of processes.

The content of batch ``step`` is a pure function of (seed, step): workers, prefetching, processes and
interruptions change nothing.
"""
