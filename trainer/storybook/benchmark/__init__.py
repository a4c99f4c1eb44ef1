"""The storybook's benchmark: held-out stories, drawn in several ways and measured against the truth."""
