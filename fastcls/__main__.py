"""``python -m fastcls``: the command line without the installed script."""

from .tools.cli import app

app()
