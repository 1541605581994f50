"""``python -m fastcls``: the command line without the installed script."""

from .cli import app

app()
