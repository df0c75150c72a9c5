"""`python -m ghost_resnet` is `ghost-resnet`."""

from .cli import app

app(prog_name="ghost-resnet")
