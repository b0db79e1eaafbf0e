"""``python -m lightning_unlearn.cli``."""

from lightning_unlearn.cli._main import main

if __name__ == "__main__":
    main()
