"""The storybook's own models: autoencoder, text-to-image model, image adapter, caption baseline, scorer."""
