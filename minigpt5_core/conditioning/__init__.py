"""Vokens to conditioning: what each family of diffusion models takes, and the mappers that answer with it.

Importing this package costs no torch: the mappers are in `mapper` and `mapper_file`.
"""

from .spaces import SPACES, Conditioning, Space, check_space

__all__ = ["SPACES", "Conditioning", "Space", "check_space"]
