"""SQL: API keys, which are stored as digests and shown once."""

import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from sqlalchemy import select, update

from service.errors import KeyNotFound
from service.storage.chain import SERVICE, Chain, Event
from service.storage.database import Database
from service.storage.tables import ApiKeyRow, now

Scope = Literal["read", "write", "train", "admin", "metrics"]

SECRET_BYTES = 32
TOKEN = re.compile(r"ks_([0-9a-f]{12})_([0-9a-f]{64})")


def read_token(token: str) -> tuple[str, bytes] | None:
    """A key's id and its secret's digest; None for what is no key of ours."""
    parts = TOKEN.fullmatch(token)
    return (parts[1], _digest(bytes.fromhex(parts[2]))) if parts else None


class ApiKeys:
    """A key is `ks_<id>_<secret>`, its secret 32 bytes of the system's random source.

    What is stored is the secret's SHA-256. Slow hashes make guessing dear where people choose a password; of 2^256
    equally likely secrets none is guessed at any speed.
    """

    def __init__(self, database: Database, chain: Chain) -> None:
        self._database = database
        self._chain = chain

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        expires_at: datetime | None,
        who: str = SERVICE,
        tags: Iterable[str] = (),
    ) -> tuple[ApiKeyRow, str]:
        """The new key's row, and the key itself, which nothing can show again. With tags it sees their series alone."""
        key_id, secret = secrets.token_hex(6), secrets.token_bytes(SECRET_BYTES)
        row = ApiKeyRow(
            key_id=key_id,
            name=name,
            digest=_digest(secret),
            scopes=sorted(set(scopes)),
            tags=sorted(set(tags)),
            expires_at=expires_at,
        )
        with self._database.write() as session:
            session.add(row)
            about = (("key", key_id), ("scopes", row.scopes))
            self._chain.append(session, [Event(who, "key.create", about=about)])
        return row, f"ks_{key_id}_{secret.hex()}"

    def list(self) -> list[ApiKeyRow]:
        """Every key ever made, the oldest first; revoked and expired ones too."""
        with self._database.read() as session:
            return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.key_id)))

    def revoke(self, key_id: str, who: str = SERVICE) -> ApiKeyRow:
        """For good; a key that was revoked before stays as it is. Raises KeyNotFound."""
        with self._database.write() as session:
            row = session.get(ApiKeyRow, key_id, with_for_update=True)
            if row is None:
                raise KeyNotFound(f"no key {key_id!r}; `keyslice keys list` has their ids")
            row.revoked_at = row.revoked_at or now()
            self._chain.append(session, [Event(who, "key.revoke", about=(("key", key_id),))])
            return row

    def used(self, key_id: str) -> None:
        """Note that the key was used just now."""
        with self._database.note() as session:
            session.execute(update(ApiKeyRow).where(ApiKeyRow.key_id == key_id).values(used_at=now()))


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
