"""The command: what it says when it cannot start."""

import os
import subprocess
import sys

import pytest


def keyslice(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)


@pytest.mark.parametrize("command", ["up", "demo", "fetch"])
def test_help_has_an_example(command):
    answer = keyslice(command, "--help")

    assert answer.returncode == 0
    assert "Example: " in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["up"], {"KEYSLICE_HOST": "0.0.0.0"}, "expected a loopback address or an API key"),
        (["up"], {"KEYSLICE_PORT": "many"}, "KEYSLICE_PORT"),
        (["up"], {"KEYSLICE_ENCODER": "resnet"}, "unknown encoder 'resnet'"),
        (["demo", "/nowhere/at/all"], {}, "no such file or directory"),
        (["fetch", "resnet", "--revision", "0" * 40], {}, "no encoder 'resnet'"),
        (["fetch", "mambaout_tiny", "--revision", "main"], {}, "expected a full commit"),
        (["fetch", "efficientnet_lite0", "--revision", "0" * 40], {}, "not on a hub"),
    ],
)
def test_a_command_that_cannot_run_says_why_and_exits_with_2(arguments, environment, said, tmp_path):
    answer = keyslice(*arguments, KEYSLICE_DATA_DIR=str(tmp_path), **environment)

    assert answer.returncode == 2
    assert said in answer.stderr.replace("\n", " ")
    assert "Traceback" not in answer.stderr
