"""The Python client: `from service.client import Keyslice`."""

from service.client.keyslice import Keyslice

__all__ = ["Keyslice"]
