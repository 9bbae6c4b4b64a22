"""Leave the trained model on the disk when a recipe fails after training."""

import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from common.errors import InputError, RunStopped, one_line
from common.run.run import Run

P = ParamSpec("P")
T = TypeVar("T")


def keep_trained_model(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate the `main` of a recipe: save the trained model if a later part of `main` fails.

    A failure before the end of training passes unchanged. A later one raises `RunStopped` or `InputError` with a
    message that names the folder and the command that uses the model.
    """

    @wraps(main)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        Run.opened = Run.trained = None
        try:
            return main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            run, Run.trained = Run.trained, None
            if run is None:
                if isinstance(error, InputError) and Run.opened is not None:
                    Run.opened.leave()
                raise
            about = run.rescue()
            if isinstance(error, InputError):
                raise InputError(*str(error).split("\n"), about) from error
            if not isinstance(error, RunStopped):
                traceback.print_exception(error)
            code = error.code if isinstance(error, RunStopped) else RunStopped.AFTER_TRAINING
            what = str(error) if isinstance(error, RunStopped) else f"{type(error).__name__}: {one_line(error)}"
            raise RunStopped(f"after training: {what}\n{about}", code) from error

    return kept
