"""Vokens to conditioning: what each family of diffusion models takes, and the mappers that answer with it.

Importing this package costs no torch: the mappers are in `mapper` and `mapper_file`.
"""

from .diffusion_families import DIFFUSION_FAMILIES, SPACES, DiffusionFamily
from .spaces import Conditioning, Space, check_space

__all__ = ["DIFFUSION_FAMILIES", "SPACES", "Conditioning", "DiffusionFamily", "Space", "check_space"]
