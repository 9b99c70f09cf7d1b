"""Addresses over the network: one spelling each, and what lies within an allowed one."""

import pytest
from pydantic import ValidationError

from service.remotes import BadAddress, DicomWeb, S3Prefix, parse_remote
from service.settings import Settings


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("dicomweb+https://PACS.example/dicom-web/", DicomWeb("https://pacs.example/dicom-web")),
        ("dicomweb+https://pacs.example:443", DicomWeb("https://pacs.example")),
        ("dicomweb+http://[::1]:8042/rs", DicomWeb("http://[::1]:8042/rs")),
        ("s3://exports", S3Prefix("exports", "")),
        ("s3://exports/", S3Prefix("exports", "")),
        ("s3://exports/2024/ct chest", S3Prefix("exports", "2024/ct chest/")),
    ],
)
def test_every_address_has_one_spelling(uri, expected):
    assert parse_remote(uri) == expected
    assert parse_remote(str(expected)) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "dicomweb+https://jane:secret@pacs/rs",
        "dicomweb+https://jane@pacs/rs",
        "dicomweb+https://@pacs/rs",
        "dicomweb+https:///rs",
        "dicomweb+https://pacs/rs?PatientID=jane",
        "dicomweb+https://pacs/rs?",
        "dicomweb+https://pacs/rs#jane",
        "dicomweb+https://pacs/rs/../jane",
        "dicomweb+https://pacs/rs/%2e%2e/jane",
        "dicomweb+https://pacs/rs//jane",
        "dicomweb+https://pacs/rs\\jane",
        "dicomweb+https://pacs:jane/rs",
        "dicomweb+https://[jane/rs",
        "dicomweb+file:///jane",
        "https://pacs/jane",
        "s3://Jane/",
        "s3://arn:aws:s3:us-east-1:1:accesspoint/jane",
        "s3:///jane",
        "s3://exports/ja\nne",
        f"s3://exports/{'jane' * 501}",
        "jane",
    ],
)
def test_anything_else_is_refused_without_being_quoted(uri):
    with pytest.raises(BadAddress) as raised:
        parse_remote(uri)

    assert "jane" not in str(raised.value).lower()


@pytest.mark.parametrize(
    ("uri", "root", "within"),
    [
        ("dicomweb+https://pacs/rs", "dicomweb+https://pacs", True),
        ("dicomweb+https://pacs/rs", "dicomweb+https://pacs/rs", True),
        ("dicomweb+https://pacs/rs2", "dicomweb+https://pacs/rs", False),
        ("dicomweb+https://pacs.example", "dicomweb+https://pacs", False),
        ("dicomweb+http://pacs/rs", "dicomweb+https://pacs/rs", False),
        ("dicomweb+https://pacs:444/rs", "dicomweb+https://pacs/rs", False),
        ("s3://exports/2024/ct", "s3://exports/2024", True),
        ("s3://exports/2024", "s3://exports", True),
        ("s3://exports/2024-secret", "s3://exports/2024", False),
        ("s3://exports-2", "s3://exports", False),
        ("s3://exports", "s3://exports/2024", False),
        ("s3://pacs", "dicomweb+https://pacs", False),
        ("dicomweb+https://pacs", "s3://pacs", False),
    ],
)
def test_what_lies_within_an_allowed_address(uri, root, within):
    assert parse_remote(uri).within(parse_remote(root)) is within


def test_the_server_of_the_credentials_is_read_at_the_start():
    assert Settings(dicomweb_server="https://PACS:443/rs/").dicomweb_server == "https://pacs/rs"
    with pytest.raises(ValidationError):
        Settings(dicomweb_server="pacs/rs")
