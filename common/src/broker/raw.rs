//! lapin alone: the bare client that benchmarks compare with.
