"""Students in production: files, latency, when to believe an answer."""
