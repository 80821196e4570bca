"""Neural networks: the paper's and ours."""
