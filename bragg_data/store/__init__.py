"""The versioned store of labelled patterns and measured profiles."""
