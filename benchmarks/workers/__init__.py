"""The tools that benchmarks/peers.py compares, each driven by a module of its own in a process of its own."""
