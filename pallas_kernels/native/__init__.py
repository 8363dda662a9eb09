"""Products and attention on a CPU: one C++ file, compiled on first use, called by XLA.

Used where a weight was prepared for it (`panels`), and for attention. Without a C++
compiler or an x86 processor with AVX-512 VNNI the operations fall back to their references.
"""
