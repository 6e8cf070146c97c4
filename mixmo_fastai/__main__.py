"""Run `mixmo` as `python -m mixmo_fastai`."""

from mixmo_fastai.cli import main

if __name__ == "__main__":
    main()
