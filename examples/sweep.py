"""Search settings of a recipe with Optuna: the learning rate, the weight decay and the masks.

pip install optuna
python examples/sweep.py digits --trials 20 --epochs 5

Each trial is an ordinary run folder. The objective is the NLL of the validation images; hopeless
trials are stopped early. The same command continues, and several processes may share a folder.
"""

import argparse
from pathlib import Path

import optuna
from fastai.callback.core import Callback

from mixmo_fastai.config.resolve import resolve_recipe
from mixmo_fastai.errors import InputError, RunFailedError
from mixmo_fastai.runs.create import create_run
from mixmo_fastai.training.ensemble import train_run
from mixmo_fastai.training.prepare import prepare


class Prune(Callback):
    """Report the validation loss of each epoch, and stop a hopeless trial."""

    order = 60  # after the Recorder

    def __init__(self, trial):
        super().__init__()
        self.trial = trial

    def after_epoch(self):
        """Compare this trial with the earlier ones."""
        self.trial.report(self.recorder.values[-1][1], self.epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def main():
    """Run trials, and print the best settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", help="a data set, a folder of images, or a table of labels")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--arch", default="wrn10_2")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder of all trials")
    args = parser.parse_args()

    def objective(trial):
        settings = {
            "optimizer.lr": trial.suggest_float("optimizer.lr", 0.01, 0.5, log=True),
            "optimizer.weight_decay": trial.suggest_float(
                "optimizer.weight_decay", 1e-5, 1e-2, log=True
            ),
            "mix.kind": trial.suggest_categorical("mix.kind", ["cutmix", "linear"]),
            "model.arch": args.arch,
            "train.epochs": args.epochs,
        }
        try:
            training = prepare(resolve_recipe(args.dataset, None, settings))
        except InputError as error:
            raise SystemExit(f"Error: {error}") from None
        run = create_run(training.recipe, args.out / f"trial-{trial.number}")
        with training.learn.no_bar():
            return train_run(training, run, cbs=[Prune(trial)])["valid"]["nll"]

    args.out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{args.out / 'optuna.db'}", study_name="mixmo", load_if_exists=True
    )
    fixed = {"dataset": args.dataset, "arch": args.arch, "epochs": args.epochs}
    if study.user_attrs.get("fixed", fixed) != fixed:
        raise SystemExit(f"Error: {args.out} has trials with {study.user_attrs['fixed']}.")
    study.set_user_attr("fixed", fixed)
    study.optimize(objective, n_trials=args.trials, catch=(RunFailedError,))  # such as divergence
    print(f"NLL {study.best_value:.4f} with trial {study.best_trial.number}: {study.best_params}")


if __name__ == "__main__":
    main()
