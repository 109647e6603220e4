"""Examples in, batches of static shape out: sources -> features -> batches."""
