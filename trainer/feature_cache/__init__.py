"""What frozen models answer about a data set, computed once and kept on disk."""
