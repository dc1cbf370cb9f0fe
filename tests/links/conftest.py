"""The model, the rows and the command line of `tests/cli`."""

from ..cli.conftest import model_dir, run, train_file  # noqa: F401
