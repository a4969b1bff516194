"""``python -m vlm`` is the command line."""

from vlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
