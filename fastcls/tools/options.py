"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda:0 and so on. Default: a GPU if there is one.")
]
DType = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: the checkpoint's own.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8: compute products in it, on a CPU and in float32 alone; see what fastcls verify says of it."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")]
