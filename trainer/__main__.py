"""`python -m trainer`, from the repository's folder."""

from .cli import main

raise SystemExit(main())
