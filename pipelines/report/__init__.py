"""The HTML report and the figures of predictions."""
