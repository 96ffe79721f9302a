"""Who may use the GPU, when, and who must make room. See docs/scheduling.md."""
