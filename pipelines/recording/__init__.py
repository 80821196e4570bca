"""Records of answers with all that they were computed from, to replay and to monitor."""
