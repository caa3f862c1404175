"""`python -m jaxdecode`."""

from __future__ import annotations

from jaxdecode.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
