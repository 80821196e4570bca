"""Views of the store: summaries of its snapshots, pictures of patterns, differences."""
