//! Benchmarks of lockkeeper.
