"""Data sets as people have them on disk: formats into records, records into the examples that a stage trains on."""
