"""What a test does with an S3 bucket."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from service.remotes import S3Prefix
from service.storage.folder import Folder

NAME = "exports"


def put(s3, **contents: bytes) -> None:
    for key, content in contents.items():
        s3.put_object(Bucket=NAME, Key=key, Body=content)


def overwrite(place, name: str, content: bytes) -> None:
    """What somebody else does to an object of a store, a Folder or a Bucket."""
    if isinstance(place, Folder):
        (place.root / name).write_bytes(content)
    else:
        place._client.put_object(Bucket=NAME, Key=place._key(name), Body=content)


def bucket_below(prefix: str):
    from service.storage.bucket import Bucket

    return Bucket(S3Prefix(NAME, prefix))


def deny(s3, key: str) -> None:
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{NAME}/{key}"}
    s3.put_bucket_policy(Bucket=NAME, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


@contextmanager
def guarded(*, known: bool) -> Iterator[dict[str, str]]:
    """The server asks who calls; credentials, as environment variables, of a user who may do nothing or of nobody."""
    import boto3

    server = os.environ["AWS_ENDPOINT_URL_S3"]
    credentials = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nobody"}
    if known:
        iam = boto3.Session().client("iam", endpoint_url=server)
        guest = f"guest-{uuid.uuid4().hex}"  # users outlive the bucket
        iam.create_user(UserName=guest)
        key = iam.create_access_key(UserName=guest)["AccessKey"]
        credentials = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    httpx.post(f"{server}/moto-api/reset-auth", content="0").raise_for_status()
    try:
        yield credentials
    finally:
        httpx.post(f"{server}/moto-api/reset-auth", content="inf").raise_for_status()
