"""Which parameters there are, which are trained, and how fast each moves."""
