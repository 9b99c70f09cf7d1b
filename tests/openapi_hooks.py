"""What schemathesis is not told by the schema: how a body of many DICOM files is sent."""

from typing import Any

import schemathesis
from schemathesis.core import NotSet


@schemathesis.serializer("multipart/related")
def related(_context: Any, value: Any) -> bytes:
    """As it is: the boundary that the header lacks is one more thing that is wrong with it."""
    return b"" if isinstance(value, NotSet) else getattr(value, "data", None) or str(value).encode()
