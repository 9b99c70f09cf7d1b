"""`keyslice receive`: the C-STORE SCP, in a process of its own."""

import os
import sys
from typing import Annotated

import typer

from service.terminal import read_settings

DEFAULT_PORT = "11112"  # DICOM's registered port for users without privileges (PS3.8 9.1.1)


def receive(
    aet: Annotated[str | None, typer.Option(help="AE title that senders must call; KEYSLICE_RECEIVE_AET's")] = None,
    port: Annotated[int | None, typer.Option(help=f"KEYSLICE_RECEIVE_PORT's, or {DEFAULT_PORT}")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; KEYSLICE_RECEIVE_HOST's")] = None,
) -> None:
    """Take CT by C-STORE into the service's stores, until Ctrl-C; `keyslice up` does it where a port is set."""
    asked = {"AET": aet, "PORT": port, "HOST": host}
    os.environ.update({f"KEYSLICE_RECEIVE_{name}": str(value) for name, value in asked.items() if value is not None})
    os.environ.setdefault("KEYSLICE_RECEIVE_PORT", DEFAULT_PORT)
    read_settings()  # wrong ones end here, with the reason
    os.execv(sys.executable, [sys.executable, "-P", "-m", "workers.receiver"])
