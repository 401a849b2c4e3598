"""``python -m kvmsnapd`` is the command ``kvmsnapd``."""

from kvmsnapd.cli import main

raise SystemExit(main())
