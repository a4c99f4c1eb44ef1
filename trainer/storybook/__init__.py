"""The storybook: a small world whose stories and pictures are made by rule, so that the truth of every scene is known."""
