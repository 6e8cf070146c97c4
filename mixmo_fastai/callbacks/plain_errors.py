"""Errors of this package's callbacks, as users of a Learner see them."""

from typing import Any

from fastai.callback.core import Callback

from mixmo_fastai.errors import InputError, remove_fastai_prefix


class PlainErrorCallback(Callback):
    """A callback whose `InputError`s have no prefix, and leave the Learner usable.

    fastai adds a prefix to the message of an error. And `validate`, `get_preds` and `predict` run
    `before_fit` while they take the Learner's lock and disable its logger; an error there would
    undo neither, and the next of these calls would wait forever. It is raised in `before_validate`
    instead, where both are restored; or in `before_train`, if another callback left the lock.
    """

    _postponed: InputError | None = None

    def __call__(self, event_name: str) -> Any:
        """Run an event; raise its `InputError` without fastai's prefix, later if necessary."""
        if event_name in ("before_fit", "before_train", "before_validate"):
            error, self._postponed = self._postponed, None
            if error is not None and event_name != "before_fit":
                raise error
        try:
            return super().__call__(event_name)
        except InputError as error:
            plain = remove_fastai_prefix(error)
            if event_name != "before_fit" or not self.learn.lock.locked():
                raise plain from None
            self._postponed = plain
