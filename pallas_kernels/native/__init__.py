"""Products of few rows on a CPU: one C++ file, compiled on first use, called by XLA.

Used where a weight was prepared for it (`panels`) or `dense_matmul` is asked for. Without a C++
compiler or an x86 processor with AVX-512 VNNI the operations fall back to their references.
"""
