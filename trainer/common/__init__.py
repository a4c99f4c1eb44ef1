"""What every room uses: recipes, pictures as tensors, progress, provenance. It knows no other room."""
