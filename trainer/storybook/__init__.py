"""The storybook: a small world whose stories and pictures are made by rule, so that every scene's truth is known."""
