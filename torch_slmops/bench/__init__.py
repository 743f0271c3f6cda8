"""What the benchmarks of the repository and of the command line share: shapes, timing, probes."""
