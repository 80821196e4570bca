"""What the files of users hold: a report as plain values, and as tables."""
