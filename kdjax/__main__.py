"""``python -m kdjax`` is ``kdjax``."""

from kdjax.cli import main

raise SystemExit(main())
