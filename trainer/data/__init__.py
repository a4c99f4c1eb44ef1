"""Stories and captioned pictures as people have them on disk, read into one kind of record."""
