"""The command line and its commands."""

from importlib.resources import files


def demo_model() -> str:
    """The folder of fastcls's own sentiment classifier, a checkpoint of transformers' kind."""
    return str(files("fastcls.tools").joinpath("data/sentiment"))
