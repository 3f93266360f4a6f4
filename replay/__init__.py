"""History: read any stretch of the log, and decide it again with the recorded effects."""
