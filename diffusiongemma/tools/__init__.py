"""Plans, benchmarks, and the peer for comparison."""
