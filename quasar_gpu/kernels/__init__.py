"""Triton kernels of a verification window: 1 to 16 rows of one sequence, everything between two matmuls fused.

Each function launches one kernel (window_attention two), writes into tensors that the caller gives, allocates nothing
and never waits: a whole pass can be captured in a CUDA graph. Grids depend on shapes alone; positions are read from
device memory. The numbers are the reference backend's (common/backends/reference.py); where roundings may differ the
docstring says so.

A row's result never depends on the number of rows or its place among them. Tiles always have the same size, with
zeros for rows that are not there; sums run over the inner dimension in an order that shapes alone decide; keys
are split at fixed positions. Greedy text with drafts is then the text without, as on CPU.
"""
