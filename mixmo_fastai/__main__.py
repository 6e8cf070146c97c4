"""`python -m mixmo_fastai` is `mixmo`."""

from mixmo_fastai.cli import main

if __name__ == "__main__":
    main()
