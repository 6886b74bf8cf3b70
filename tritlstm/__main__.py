"""`python -m tritlstm` is the command `tritlstm`."""

from tritlstm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
