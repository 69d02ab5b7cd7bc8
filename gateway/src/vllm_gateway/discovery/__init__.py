"""Where the table comes from: Kubernetes, or a fixed list of backends."""
