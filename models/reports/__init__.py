"""HTML pages about what was run."""
