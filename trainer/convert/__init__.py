"""Published checkpoints into our files: python -m trainer convert --help."""
