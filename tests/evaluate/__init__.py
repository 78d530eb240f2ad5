"""Questions in files, answers in files, and what benchmarks make of them."""
